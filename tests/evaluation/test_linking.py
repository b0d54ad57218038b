"""Boxes of neighbouring slices that become objects: by hand, and against a plain search over all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.evaluation.detected_boxes import Found
from sslmed.evaluation.linking import GAP, LEAST, Object, link

Box = tuple[float, float, float, float]


def found(*boxes: tuple[Box, float, int]) -> Found:
    """Of (corners, score, class) by falling score."""
    return Found(
        np.array([box for box, _, _ in boxes], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in boxes], np.float64),
        np.array([label for _, _, label in boxes], np.int16),
    )


def members(each: Object) -> list[tuple[int, float]]:
    return list(zip(each.slices.tolist(), each.scores.tolist(), strict=True))


A: Box = (0, 0, 10, 10)


def test_neighbouring_slices_become_one_object() -> None:
    slices = [found((A, 0.6, 0)), found(((1, 2, 11, 12), 0.9, 0)), found(((2, 1, 12, 14), 0.7, 0))]
    (one,) = link(slices)
    assert members(one) == [(0, 0.6), (1, 0.9), (2, 0.7)]
    assert (one.label, one.score) == (0, 0.9)
    assert one.hull.tolist() == [0, 0, 12, 14]
    assert one.xyxy.dtype == np.float32
    assert not one.xyxy.flags.writeable


def test_one_slice_may_be_missing_and_two_may_not() -> None:
    nothing = found()
    (one,) = link([found((A, 0.6, 0)), nothing, found((A, 0.5, 0))])
    assert one.slices.tolist() == [0, 2]
    first, second = link([found((A, 0.6, 0)), nothing, nothing, found((A, 0.5, 0))])
    assert (first.slices.tolist(), second.slices.tolist()) == ([0], [3])


def test_classes_stay_apart() -> None:
    one, other = link([found((A, 0.6, 0)), found((A, 0.8, 1))])
    assert [(each.label, each.score) for each in (one, other)] == [(1, 0.8), (0, 0.6)], "by falling score"


def test_the_least_overlap() -> None:
    """Two boxes of 10 x 10 that are ``d`` apart have an IoU of (10 - d) / (10 + d): 0.3 at 70 / 13 = 5.38."""
    assert len(link([found((A, 0.6, 0)), found(((5.3, 0, 15.3, 10), 0.5, 0))])) == 1
    assert len(link([found((A, 0.6, 0)), found(((5.5, 0, 15.5, 10), 0.5, 0))])) == 2


def test_the_nearest_is_taken_first_whatever_the_scores() -> None:
    """Of two boxes that overlap the object the nearer joins; the other begins an object of its own."""
    near, far = (1.0, 0.0, 11.0, 10.0), (3.0, 0.0, 13.0, 10.0)
    one, other = link([found((A, 0.6, 0)), found((far, 0.9, 0), (near, 0.5, 0))])
    assert members(one) == [(1, 0.9)]
    assert members(other) == [(0, 0.6), (1, 0.5)]


def test_a_box_joins_one_object_only() -> None:
    between = (1.0, 0.0, 11.0, 10.0)
    joined, alone = link([found((A, 0.9, 0), ((4, 0, 14, 10), 0.8, 0)), found((between, 0.7, 0))])
    assert members(joined) == [(0, 0.9), (1, 0.7)]
    assert members(alone) == [(0, 0.8)]


def test_of_an_image_each_box_is_an_object() -> None:
    boxes = found((A, 0.9, 1), (A, 0.8, 0), ((1, 1, 11, 11), 0.8, 1))
    every = link([boxes])
    assert [(each.label, each.score) for each in every] == [(1, 0.9), (0, 0.8), (1, 0.8)]
    assert all(each.slices.tolist() == [0] for each in every)


def test_without_boxes() -> None:
    assert link([]) == ()
    assert link([found(), found()]) == ()


def test_a_box_without_area_is_refused() -> None:
    with pytest.raises(ValueError, match="area"):
        link([found((A, 0.6, 0)), found(((1, 1, 1, 5), 0.5, 0))])


def overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0) * max(height, 0)
    return both / sum([(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)], -both)


def plain(slices: list[list[Box]]) -> set[tuple[tuple[int, Box], ...]]:
    """The rule as it is said, pair by pair."""
    chains: list[list[tuple[int, Box]]] = []
    for number, boxes in enumerate(slices):
        left, open_ = list(boxes), [chain for chain in chains if number - chain[-1][0] <= GAP + 1]
        while left and open_:
            chain, box = max(
                ((chain, box) for chain in open_ for box in left), key=lambda p: overlap(p[0][-1][1], p[1])
            )
            if overlap(chain[-1][1], box) < LEAST:
                break
            chain.append((number, box))
            open_.remove(chain)
            left.remove(box)
        chains += [[(number, box)] for box in left]
    return {tuple(chain) for chain in chains}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_the_same_as_a_plain_search(seed: int) -> None:
    stream = np.random.default_rng(seed)
    slices: list[list[Box]] = []
    for _ in range(6):
        corner = stream.uniform(0, 20, (int(stream.integers(0, 5)), 2))
        boxes = np.concatenate([corner, corner + stream.uniform(4, 15, corner.shape)], axis=1).astype(np.float32)
        slices.append([(left, top, right, bottom) for left, top, right, bottom in boxes.tolist()])
    every = link([found(*((box, 0.5, 0) for box in boxes)) for boxes in slices])
    made = {tuple(zip(each.slices.tolist(), map(tuple, each.xyxy.tolist()), strict=True)) for each in every}
    assert made == plain(slices)
    assert sum(len(each.slices) for each in every) == sum(map(len, slices))
