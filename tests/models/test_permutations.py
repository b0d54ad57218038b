"""Permutations that differ in many places: all distinct, greedily farthest, the same everywhere."""

import hashlib
import itertools

import numpy as np
import pytest

from sslmed.models.permutations import maximal_hamming


def distances(table: np.ndarray) -> np.ndarray:
    """In how many places each two differ, in loops."""
    return np.array([sum(a != b for a, b in zip(x, y, strict=True)) for x, y in itertools.combinations(table, 2)])


def by_mean_alone(count: int, places: int) -> np.ndarray:
    """Algorithm 1 of arXiv 1603.09246: the next one is farthest from those before on the average."""
    every = np.array(list(itertools.permutations(range(places))), dtype=np.uint8)
    total, chosen = np.zeros(len(every)), [0]
    for _ in range(count - 1):
        total += (every != every[chosen[-1]]).sum(axis=1)
        total[chosen] = -1
        chosen.append(int(total.argmax()))
    return every[chosen]


@pytest.mark.parametrize(("count", "places"), [(2, 9), (30, 9), (100, 9), (720, 6)])
def test_every_row_is_another_permutation(count: int, places: int) -> None:
    table = maximal_hamming(count, places)
    assert table.shape == (count, places)
    assert (np.sort(table, axis=1) == np.arange(places)).all()
    assert len({tuple(row) for row in table}) == count


@pytest.mark.parametrize(("count", "least"), [(10, 8), (30, 7), (100, 6)])
def test_two_of_them_differ_in_so_many_of_nine_places(count: int, least: int) -> None:
    found = distances(maximal_hamming(count, 9))
    assert found.min() == least
    assert found.mean() > 8.07


def test_the_papers_choice_has_the_same_mean_and_pairs_that_are_almost_equal() -> None:
    ours, theirs = distances(maximal_hamming(30, 9)), distances(by_mean_alone(30, 9))
    assert theirs.min() == 2
    assert ours.min() == 7
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_each_is_the_farthest_of_all_when_it_is_chosen(seed: int) -> None:
    table = maximal_hamming(40, 5, seed)
    every = np.array(list(itertools.permutations(range(5))))
    for number in range(1, 40):
        before = (every[:, None] != table[None, :number]).sum(axis=2)
        rank = before.min(axis=1) * 1000 + before.sum(axis=1)
        (own,) = np.flatnonzero((every == table[number]).all(axis=1))
        assert own == rank.argmax()


def test_the_set_is_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(maximal_hamming(100, 9).tobytes()).hexdigest()
    maximal_hamming.cache_clear()
    assert hashlib.sha256(maximal_hamming(100, 9).tobytes()).hexdigest() == digest
    assert digest[:16] == "7ba045a3c73b916b"
    assert not (maximal_hamming(100, 9, seed=1) == maximal_hamming(100, 9)).all()


def test_what_is_shared_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        maximal_hamming(10, 9)[0, 0] = 1
