"""Small stores written by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.data import splits
from sslmed.data.annotations.writer import annotate
from sslmed.data.intensity import Intensity
from sslmed.data.modality import named, policy_record
from sslmed.data.shards.tables import NewScan
from sslmed.data.shards.writer import StoreWriter
from sslmed.data.store import Store


def write_store(
    path: Path,
    scans: Sequence[NewScan],
    patients: Sequence[str],
    *,
    modality: str = "xray",
    key_id: str = "0123abcd",
    split: np.ndarray | None = None,
    labels: Sequence[Any] = (),
    meta: Sequence[Any] = (),
    **options: Any,
) -> Store:
    """Scans, the keyed patient of each, and what is known of every row (a slice is one)."""
    with StoreWriter(
        path, modality=modality, key_id=key_id, policy=policy_record(named(modality)), **options
    ) as writer:
        for scan in scans:
            writer.add(scan)
        whose = np.array([patient.encode() for patient in patients], "S32")[writer.column("scan")]
        sides = np.zeros(len(writer), np.uint8) if split is None else split
        digest = splits.digest(whose, sides)
        with writer.finish(patients=whose, split=sides, split_digest=digest) as folder:
            if labels or meta:
                annotate(folder, labels=labels, meta=meta)
    return Store(path)


def picture(pixels: np.ndarray, content: str, low: float = 0, high: float = 255) -> NewScan:
    """An image with an intensity range."""
    return NewScan(pixels, Intensity(low, high, (low + high) / 2, (high - low) / 4), content)


SHAPES = ("background", "disc", "bar")


def shapes(stream: np.random.Generator, size: tuple[int, int] = (40, 48)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture with a bright disc and a dark bar, and its mask."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    row, column, radius = stream.integers(10, size[0] - 10), stream.integers(10, size[1] // 2), stream.integers(5, 8)
    mask = np.zeros(size, np.uint8)
    mask[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = 1
    left = int(stream.integers(size[1] // 2 + 4, size[1] - 6))
    mask[4:-4, left : left + 4] = 2
    pixels = 100 + 90.0 * (mask == 1) - 80.0 * (mask == 2) + stream.normal(0, 8, size)
    return np.clip(pixels, 0, 255).astype(np.uint8), mask


def write_shapes(path: Path, patients: int = 24, size: tuple[int, int] = (40, 48), **changes: Any) -> Store:
    """A store of `shapes`, an image a patient: a half of them train, a quarter val, a quarter test.

    Args:
        changes: ``mask_of``, (patient, mask) -> mask, None for an image without one; ``meta`` as in `annotate`.
    """
    stream = np.random.default_rng(0)
    drawn = [shapes(stream, size) for _ in range(patients)]
    sides = (splits.TRAIN, splits.TRAIN, splits.VAL, splits.TEST)
    split = np.array([sides[patient % 4] for patient in range(patients)], np.uint8)
    measure = named("xray").intensity
    scans = [NewScan(pixels, measure(pixels), f"{patient:064x}") for patient, (pixels, _) in enumerate(drawn)]
    store = write_store(path, scans, [f"{patient:032x}" for patient in range(patients)], split=split)
    mask_of = changes.get("mask_of", lambda _, mask: mask)
    masks = [(patient, mask_of(patient, mask)) for patient, (_, mask) in enumerate(drawn)]
    kept = [(patient, mask) for patient, mask in masks if mask is not None]
    annotate(store.path, masks=kept, mask_classes=SHAPES, meta=changes.get("meta", ()))
    return Store(path)
