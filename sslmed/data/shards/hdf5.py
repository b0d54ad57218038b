"""HDF5 files, read without locks or links and made in memory. The only door to h5py and hdf5plugin."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError


def open_h5(path: Path) -> Any:
    """Open an HDF5 file for reading, without a lock: many ranks may read it from a network disk."""
    if path.is_symlink():
        raise OSError(f"{path.name} is a symbolic link")
    import h5py
    import hdf5plugin  # noqa: F401  registers the filters

    # An image is a chunk and is read once an epoch: a chunk cache would only copy it.
    return h5py.File(path, "r", locking=False, rdcc_nbytes=0)


def new_h5(name: str) -> Any:
    """A new HDF5 file in memory; `h5_bytes` gives what belongs on the disk.

    HDF5 never writes to the disk itself: when the disk is full it leaves objects that crash the process once they are
    freed (measured with h5py 3.16), while a plain write raises an error.
    """
    import h5py

    return h5py.File(name, "w", driver="core", backing_store=False, block_size=2**22, libver=("v110", "v110"))


def h5_bytes(file: Any) -> bytes:
    """The content of a file made by `new_h5`."""
    file.flush()
    return cast(bytes, file.id.get_file_image())


class HardDataset:
    """A dataset that holds its own data, opened and read without h5py's comfort, which costs more than a small image.

    A ValueError or KeyError refuses what is no dataset, or leads out of the file.

    Attributes:
        shape, dtype: of all of it.
    """

    __slots__ = ("_id", "dtype", "shape")

    def __init__(self, file: Any, name: str) -> None:
        from h5py import h5d, h5l

        links, path = file.id.links, name.encode()
        if not links.exists(path) or links.get_info(path).type != h5l.TYPE_HARD:
            raise ValueError(f"{name} is missing or a link")
        self._id = h5d.open(file.id, path)  # a KeyError where it is no dataset
        made = self._id.get_create_plist()
        if made.get_layout() == h5d.VIRTUAL or made.get_external_count():
            raise ValueError(f"{name} does not hold its own data")
        self.shape: tuple[int, ...] = self._id.shape
        self.dtype: np.dtype[Any] = self._id.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, window: tuple[slice, ...] = ()) -> npt.NDArray[Any]:
        """The part of the dataset within ``window``: slices with both ends, for the first axes; all without."""
        from h5py import h5s

        ends = [(each.start, each.stop) for each in window] + [(0, side) for side in self.shape[len(window) :]]
        start, shape = tuple(first for first, _ in ends), tuple(last - first for first, last in ends)
        if any(first < 0 or last > side for (first, last), side in zip(ends, self.shape, strict=True)):
            raise IndexError(f"{start} and on, {shape}, of a dataset of {self.shape}")
        pixels = np.empty(shape, self.dtype)
        if pixels.size:
            space = self._id.get_space()
            space.select_hyperslab(start, shape)
            self._id.read(h5s.create_simple(shape), space, pixels)
        return pixels


def chunk_filters() -> dict[str, Any]:
    """The filters of a shard's datasets, as keyword arguments of ``create_dataset``."""
    import hdf5plugin

    return {**hdf5plugin.Bitshuffle(cname="lz4"), "fletcher32": True}


def read_column(path: Path, name: str) -> npt.NDArray[Any]:
    """A whole dataset of an HDF5 file, as an array.

    Raises:
        DataError: it is not there, damaged, or a link.
    """
    try:
        with open_h5(path) as file:
            return HardDataset(file, name).read()
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: column {name!r} cannot be read ({error}). Ingest again.") from error
