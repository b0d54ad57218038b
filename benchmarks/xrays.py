"""What the benchmarks on chest X-rays share: the store with its fixed split, recipes as settings, tables."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

import sslmed
from sslmed.data import modality
from sslmed.data.loading import plain_loader
from sslmed.data.store import Store
from sslmed.evaluation import probes

ROOT = Path(__file__).parents[1]


def open_store(source: Path, work: Path) -> Store:
    """The store."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "store").exists():
        labels, key = source / "labels.csv", public_key(work)
        sslmed.ingest(
            source, work / "store", modality="xray", labels=labels, label_columns=("label", "subtype"), key=key
        )
    return Store(work / "store")


def public_key(work: Path) -> Path:
    """A file with the benchmarks' site key. It is public, as the images are, so that everyone gets the same split."""
    key = work / "site.key"
    key.write_text(hashlib.sha256(b"sslmed benchmark").hexdigest() + "\n", encoding="ascii")
    return key


def recipe_text(name: str) -> str:
    """The shipped recipe without its comments, which do not decide the result."""
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def labelled(store: Store, split: str, target: str) -> npt.NDArray[np.int64]:
    """The labelled rows of a split."""
    rows = store.rows(split)
    return rows[store.target(target)[rows] >= 0]


def embed(network: nn.Module, store: Store, rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float32]:
    """Frozen features of unaugmented images."""
    return probes.embed(network, plain_loader(store, rows, size, modality.named(store.modality), channels=1))


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def interval(value: Any, sign: str = "") -> str:
    """``0.912 [0.880, 0.941]`` of a mapping with mean, low and high; a dash for None."""
    if value is None:
        return "—"
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "—" if value is None else f"{value:.3f}"
