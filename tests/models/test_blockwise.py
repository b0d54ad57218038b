"""Masks of rectangles: never more than asked, nearly as many, everywhere, the same for the same stream."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.keyed_rng import rng
from sslmed.models.blockwise import blockwise_mask


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_never_more_than_asked(rows: int, columns: int, share: float, seed: int) -> None:
    count = int(share * rows * columns)
    mask = blockwise_mask(rng(seed, 0, 0, "mask"), (rows, columns), count)
    assert mask.shape == (rows, columns)
    assert mask.sum() <= count
    if min(rows, columns) > 3:
        assert (mask.sum() > 0) == (count > 0)


@pytest.mark.parametrize("count", [14, 43, 72])
def test_nearly_as_many_as_asked_and_every_patch_now_and_then(count: int) -> None:
    masks = np.stack([blockwise_mask(rng(0, 0, sample, "mask"), (12, 12), count) for sample in range(300)])
    assert masks.sum(axis=(1, 2)).mean() > 0.9 * count
    often = masks.mean(axis=0)
    assert often.min() > 0.1 * count / 144
    assert often.max() < 2 * count / 144


def test_what_is_hidden_hangs_together() -> None:
    def inside(mask: np.ndarray) -> float:
        """The share of hidden patches whose right neighbour is hidden too."""
        return float((mask[:, :-1] & mask[:, 1:]).sum() / mask[:, :-1].sum())

    masks = [blockwise_mask(rng(0, 0, sample, "mask"), (14, 14), 60) for sample in range(50)]
    scattered = [
        rng(0, 0, sample, "mask").permuted(mask.flatten()).reshape(14, 14) for sample, mask in enumerate(masks)
    ]
    assert np.mean([inside(mask) for mask in masks]) > 0.7
    assert np.mean([inside(mask) for mask in scattered]) < 0.4


def test_a_stream_decides() -> None:
    first, again, other = (blockwise_mask(rng(0, 0, sample, "mask"), (8, 8), 20) for sample in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
