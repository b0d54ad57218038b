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
