import numpy as np
import pytest
import torch

from sslmed.config import UsageError
from sslmed.data.sampling import FAR, StreamSampler, steps_per_epoch

ROWS = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377])

Address = tuple[int, int]


def stream(batch_size: int = 4, steps: int = 12, seed: int = 0, **how: int) -> list[list[Address]]:
    return list(StreamSampler(ROWS, batch_size, steps, seed, **how))


def flat(batches: list[list[Address]]) -> list[Address]:
    return [address for batch in batches for address in batch]


def test_the_order_is_a_function_of_the_seed_alone() -> None:
    assert stream(seed=1) == stream(seed=1)
    assert stream(seed=1) != stream(seed=2)
    before = stream(seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert stream(seed=1) == before
    assert stream(seed=1, steps=20)[:12] == before  # a longer training begins like a shorter one


def test_every_epoch_is_a_permutation_of_its_own_without_repeats() -> None:
    batches = stream(batch_size=4, steps=12)  # eleven rows: two steps an epoch, three rows left out
    assert steps_per_epoch(len(ROWS), 4) == 2
    orders = []
    for epoch in range(6):
        addresses = flat(batches[2 * epoch : 2 * epoch + 2])
        assert {number for number, _ in addresses} == {epoch}
        rows = [row for _, row in addresses]
        assert len(set(rows)) == len(rows) == 8
        assert set(rows) < set(ROWS.tolist())
        orders.append(tuple(rows))
    assert len(set(orders)) == 6
    assert {row for order in orders for row in order} == set(ROWS.tolist())  # the left-out rows differ


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 11, 12])
def test_a_resumed_stream_is_the_tail_of_the_whole(start: int) -> None:
    assert stream(start=start) == stream()[start:]


def test_the_length_is_of_the_whole_stream_even_when_resumed() -> None:
    """Lightning counts its batches from the start of the stream."""
    assert len(StreamSampler(ROWS, 4, 12, 0)) == len(StreamSampler(ROWS, 4, 12, 0, start=7)) == 12
    assert len(StreamSampler(ROWS, 4, 12, 0, accumulate=2)) == 24


def test_ranks_take_slices_of_the_same_global_batch() -> None:
    whole = stream()
    slices = [stream(rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*slices, strict=True)] == whole
    assert {len(batch) for rank in slices for batch in rank} == {2}


@pytest.mark.parametrize("start", [0, 3])
def test_accumulated_parts_join_to_the_same_global_batch(start: int) -> None:
    parts = stream(accumulate=2, start=2 * start)
    joined = [parts[number] + parts[number + 1] for number in range(0, len(parts), 2)]
    assert joined == stream(start=start)


def test_ranks_and_parts_together() -> None:
    """Each part is a global micro-batch, of which each rank takes its slice."""
    slices = [stream(rank=rank, world_size=2, accumulate=2) for rank in range(2)]
    micro = [first + second for first, second in zip(*slices, strict=True)]
    assert micro == stream(accumulate=2)


def test_more_samples_a_step_than_images_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size is 12, but there are 11 .*train\.batch_size=11"):
        StreamSampler(ROWS, 12, 1, 0)
    assert steps_per_epoch(11, 11) == 1


@pytest.mark.parametrize("how", [{"accumulate": 3}, {"world_size": 3}, {"accumulate": 2, "world_size": 4}])
def test_a_batch_that_cannot_be_divided_is_a_usage_error(how: dict[str, int]) -> None:
    parts = how.get("accumulate", 1) * how.get("world_size", 1)
    with pytest.raises(UsageError, match=rf"train\.batch_size is 4.* {parts}"):
        StreamSampler(ROWS, 4, 1, 0, **how)


# Strata.

CLASSES = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 7, 7])


def balanced(batch_size: int = 3, steps: int = 12, seed: int = 0, **how: int) -> list[list[Address]]:
    return list(StreamSampler(ROWS, batch_size, steps, seed, strata=CLASSES, **how))


def epochs(batches: list[list[Address]]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for epoch, row in flat(batches):
        found.setdefault(epoch % FAR, []).append(row)
    return list(found.values())


def test_no_address_comes_twice() -> None:
    """A row that comes again is another view of it: the same address would be the same picture, bit for bit."""
    addresses = flat(balanced(9, steps=20))
    assert len(set(addresses)) == len(addresses)
    often = [row for epoch, row in addresses if epoch >= FAR]
    assert often, "a stratum of one row comes three times an epoch"
    turns = sorted({epoch // FAR for epoch, row in addresses if row == often[0]})
    assert turns == list(range(len(turns)))


def test_every_stratum_is_met_equally_often_in_every_epoch() -> None:
    stratum = dict(zip(ROWS.tolist(), CLASSES.tolist(), strict=True))
    for rows in epochs(balanced()):
        assert len(rows) == 9  # as long as without strata
        met = [stratum[row] for row in rows]
        assert [met.count(each) for each in (0, 1, 7)] == [3, 3, 3]
        often = [rows.count(row) for row in ROWS]
        assert max(often[:7]) == 1  # of a large one none comes twice
        assert sorted(often[7:9]) == sorted(often[9:]) == [1, 2]  # of a small one all come
    assert {row for rows in epochs(balanced(steps=30)) for row in rows} == set(ROWS.tolist())


def test_strata_are_mixed_within_an_epoch() -> None:
    stratum = dict(zip(ROWS.tolist(), CLASSES.tolist(), strict=True))
    first = [stratum[rows[0]] for rows in epochs(balanced(steps=180))]
    assert all(10 <= first.count(each) <= 30 for each in (0, 1, 7))  # of 60 epochs


def test_what_cannot_be_shared_equally_goes_to_another_stratum_each_time() -> None:
    stratum = dict(zip(ROWS.tolist(), CLASSES.tolist(), strict=True))
    counts = [[[stratum[row] for row in rows].count(each) for each in (0, 1, 7)] for rows in epochs(balanced(5, 200))]
    assert {tuple(sorted(each)) for each in counts} == {(3, 3, 4)}
    assert (np.mean(counts, axis=0) > 3.15).all()


def test_one_stratum_and_as_many_as_rows_are_plain_permutations() -> None:
    for strata in (np.zeros(11, int), np.arange(11)):
        for rows in epochs(list(StreamSampler(ROWS, 11, 6, 0, strata=strata))):
            assert sorted(rows) == ROWS.tolist()
    few = epochs(list(StreamSampler(ROWS, 4, 2, 0, strata=np.arange(11))))  # more strata than places: some wait
    assert len(set(few[0])) == 8


def test_a_balanced_stream_is_keyed_resumed_and_shared_like_any_other() -> None:
    whole = balanced(4, seed=1)
    assert whole == balanced(4, seed=1) != balanced(4, seed=2)
    assert len({tuple(rows) for rows in epochs(whole)}) == 6
    for start in (0, 1, 5, 12):
        assert balanced(4, seed=1, start=start) == whole[start:]
    slices = [balanced(4, seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*slices, strict=True)] == whole
    parts = balanced(4, seed=1, accumulate=2)
    assert [parts[number] + parts[number + 1] for number in range(0, len(parts), 2)] == whole


def test_the_stream_of_old_runs_stays_as_it_was() -> None:
    """Written down before strata came: a resumed run must go on with the same rows."""
    expected = [[13, 34, 377, 3], [89, 21, 8, 233], [233, 55, 89, 377]]
    assert [[row for _, row in batch] for batch in stream(steps=3)] == expected
