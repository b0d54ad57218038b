"""A few rows that show what a store holds."""

import numpy as np
import numpy.typing as npt

from sslmed.data.store import Store
from sslmed.keyed_rng import rng


def choose(store: Store, count: int, seed: int) -> list[int]:
    """Rows spread over splits, shapes and patients; of volumes and clips a slice near the middle, or with a class.

    Where a store has fewer scans, several slices of one.
    """
    index, table = store.index, store.scans
    first = table.first.astype(np.int64)
    stream = rng(seed, 0, 0, "preview")
    order = stream.permutation(len(table))
    kinds = np.stack([index.split[first], index.group[first], index.channels[first]])[:, order]
    alike = np.unique(kinds, axis=1, return_inverse=True)[1].ravel()
    order = order[np.argsort(_turn(alike), kind="stable")]  # one of each kind, then another of each, ...
    chosen = order[:count]
    each = [count // len(chosen) + (place < count % len(chosen)) for place in range(len(chosen))]
    rows: list[int] = []
    for scan, wanted in zip(chosen.tolist(), each, strict=True):
        rows += _slices(store, int(first[scan]), int(table.depth[scan]), wanted)
    return sorted(rows)


def _slices(store: Store, first: int, depth: int, wanted: int) -> list[int]:
    """Up to ``wanted`` rows of a scan, evenly spread; of those that have a class or a box, where some have."""
    rows = np.arange(first, first + depth)
    if depth > 1:
        marked = (
            store.annotations.mask_presence()[rows][:, 1:].any(axis=1) if store.mask_classes else np.zeros(depth, bool)
        )
        if store.box_classes:
            marked |= store.annotations.boxed()[rows]
        rows = rows[marked] if marked.any() else rows
    places = (np.arange(1, wanted + 1) * len(rows)) // (wanted + 1)
    return [int(row) for row in dict.fromkeys(rows[places].tolist())]


def _turn(kinds: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """(N,) how many of its kind come before each."""
    order = np.argsort(kinds, kind="stable")
    _, starts, counts = np.unique(kinds[order], return_index=True, return_counts=True)
    turn = np.empty(len(kinds), np.intp)
    turn[order] = np.arange(len(kinds)) - np.repeat(starts, counts)
    return turn
