"""What a store consists of: its columns, the names of its parts, and ``store.json`` with the digest over all of it."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, MissingInputError

SCHEMA = 1
STORE_JSON = "store.json"
INDEX_H5 = "index.h5"

_SHARD_NAME = re.compile(r"shard-\d{5}\.h5")


@dataclass(frozen=True)
class LabelColumn:
    """A label of the images: "class" is one of several texts, "binary" a 0/1 finding with the classes "0" and "1"."""

    name: str
    kind: Literal["class", "binary"]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class MetaColumn:
    """One property of the images that is no label: a number, or one of ``categories``."""

    name: str
    kind: Literal["number", "category"]
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Index:
    """Where each image lies and what is known of it: arrays of one length, a row an image.

    ``patient`` S32, keyed; ``split`` position in SPLITS; ``shard``, ``group``, ``row`` shard number, dataset and place
    in it; ``height``, ``width`` in pixels; ``low``, ``high`` the modality's intensity range in stored units;
    ``content`` the keyed digest of the image as it was read.
    """

    patient: npt.NDArray[np.bytes_]
    split: npt.NDArray[np.uint8]
    shard: npt.NDArray[np.uint16]
    group: npt.NDArray[np.uint32]
    row: npt.NDArray[np.uint32]
    height: npt.NDArray[np.uint32]
    width: npt.NDArray[np.uint32]
    channels: npt.NDArray[np.uint8]
    dtype: npt.NDArray[np.bytes_]
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    content: npt.NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.patient)


def read_about(path: Path) -> dict[str, Any]:
    """Read and check ``store.json``: its own digest, the schema version and that it names only its own shards."""
    if not path.exists():
        raise MissingInputError(f"no store at {path}. Make one: sslmed ingest SOURCE --out {path} --modality M")
    try:
        about = json.loads((path / STORE_JSON).read_text(encoding="utf-8"))
        if about["schema"] != SCHEMA:
            raise DataError(
                f"{path} has store schema {about['schema']}; this sslmed reads schema {SCHEMA}. "
                "Ingest the images again with this version, or use the sslmed that made the store."
            )
        whole = about["digest"] == digest(about)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is no store: it has no {STORE_JSON}. Make one: sslmed ingest SOURCE --out STORE"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / STORE_JSON} cannot be read ({error}). Ingest the images again.") from error
    if not whole or not all(_SHARD_NAME.fullmatch(shard["file"]) for shard in about["shards"]):
        raise DataError(f"{path / STORE_JSON} is damaged: it does not match its own digest. Ingest the images again.")
    return cast(dict[str, Any], about)


def digest(about: Mapping[str, Any]) -> str:
    """SHA-256 of what ``store.json`` says but for the digest itself; the digests of index and shards are part of it."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def group_name(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    """The dataset for images of one dtype and shape, such as ``uint16_128x96x1`` (height, width, channels)."""
    height, width, channels = (*shape, 1)[:3]
    return f"{dtype.name}_{height}x{width}x{channels}"
