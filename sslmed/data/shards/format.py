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

SCHEMA = 2
STORE_JSON = "store.json"
INDEX_H5 = "index.h5"
TILE = 128
TILED = "_tiled"
KINDS = ("image", "volume", "clip")

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
    """Where each image lies and whose it is: arrays of one length, a row an image (a picture, a slice, a frame).

    ``patient`` S32, keyed; ``split`` position in SPLITS; ``scan`` number of the scan that it belongs to, whose rows are
    consecutive; ``slice`` its number there; ``shard``, ``group``, ``row`` shard number, dataset and place in it;
    ``height``, ``width`` in pixels; ``content`` the keyed digest of the whole scan as it was read.
    """

    patient: npt.NDArray[np.bytes_]
    split: npt.NDArray[np.uint8]
    scan: npt.NDArray[np.uint32]
    slice: npt.NDArray[np.uint32]
    shard: npt.NDArray[np.uint16]
    group: npt.NDArray[np.uint32]
    row: npt.NDArray[np.uint32]
    height: npt.NDArray[np.uint32]
    width: npt.NDArray[np.uint32]
    channels: npt.NDArray[np.uint8]
    dtype: npt.NDArray[np.bytes_]
    content: npt.NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.patient)


@dataclass(frozen=True, eq=False)
class ScanTable:
    """What is known of each scan: arrays of one length, an entry a scan.

    ``first`` its first row, ``depth`` its number of rows; ``kind`` position in KINDS; ``source_height``,
    ``source_width`` of its images before ``ingest --size``; ``flipped``, as 1, 2 and 4, and ``sheared`` see
    `Scan`; ``low``, ``high``, ``mean``, ``std`` its `Intensity`; ``spacing`` (S, 3) mm between slices, down and across,
    of the images as stored, NaN where unknown; ``geometry`` place in `Geometries`, -1 where it is not placed.
    """

    first: npt.NDArray[np.uint32]
    depth: npt.NDArray[np.uint32]
    kind: npt.NDArray[np.uint8]
    source_height: npt.NDArray[np.uint32]
    source_width: npt.NDArray[np.uint32]
    flipped: npt.NDArray[np.uint8]
    sheared: npt.NDArray[np.uint8]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    spacing: npt.NDArray[np.float64]
    geometry: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True, eq=False)
class Geometries:
    """Where scans lie in the patient: arrays of one length.

    ``affine`` (G, 4, 4) of the volume as stored, see `Scan.affine`; ``grid_shape`` (G, 3), ``grid_turn`` (G, 3, 2),
    ``grid_fields`` (G, 25) the `NiftiGrid` of its file, a shape of zeros where it was no NIfTI file.
    """

    affine: npt.NDArray[np.float64]
    grid_shape: npt.NDArray[np.uint32]
    grid_turn: npt.NDArray[np.int8]
    grid_fields: npt.NDArray[np.float64]


ROW = np.dtype(
    [
        ("patient", "S32"),
        ("split", "u1"),
        ("scan", "u4"),
        ("slice", "u4"),
        ("shard", "u2"),
        ("group", "u4"),
        ("row", "u4"),
        ("height", "u4"),
        ("width", "u4"),
        ("channels", "u1"),
        ("dtype", "S8"),
        ("content", "S64"),
    ]
)
SCAN = np.dtype(
    [
        ("first", "u4"),
        ("depth", "u4"),
        ("kind", "u1"),
        ("source_height", "u4"),
        ("source_width", "u4"),
        ("flipped", "u1"),
        ("sheared", "u1"),
        ("low", "f8"),
        ("high", "f8"),
        ("mean", "f8"),
        ("std", "f8"),
        ("spacing", "f8", (3,)),
        ("geometry", "i4"),
    ]
)
GEOMETRY = np.dtype(
    [
        ("affine", "f8", (4, 4)),
        ("grid_shape", "u4", (3,)),
        ("grid_turn", "i1", (3, 2)),
        ("grid_fields", "f8", (25,)),
    ]
)


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
            f"{path} is no store: it has no {STORE_JSON}. Make one: sslmed ingest SOURCE --out STORE --modality M"
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


def group_name(dtype: np.dtype[Any], shape: tuple[int, ...], tiled: bool = False) -> str:
    """The dataset for images of one dtype and shape, such as ``uint16_128x96x1`` (height, width, channels).

    Slices of volumes, which are stored in tiles, have one of their own: ``int16_512x512x1_tiled``.
    """
    height, width, channels = (*shape, 1)[:3]
    return f"{dtype.name}_{height}x{width}x{channels}{TILED if tiled else ''}"


def tile(side: int) -> int:
    """The side of a chunk of a volume's slice: an even share of ``side``, at most 128 pixels.

    Whole slices of 512 x 512 take a fifth longer to read in such tiles than as one chunk; a plane across another axis
    takes a third of the time, a crop of 64 voxels a quarter (``benchmarks/store.py``).
    """
    return -(-side // -(-side // TILE))
