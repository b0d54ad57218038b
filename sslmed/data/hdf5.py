"""HDF5 files, read without locks or links and made in memory. The only door to h5py and hdf5plugin."""

from pathlib import Path
from typing import Any, cast


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


def hard_dataset(file: Any, name: str) -> Any:
    """The dataset ``name`` of ``file``; a ValueError refuses links and storage that lead out of the file."""
    import h5py

    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is missing or a link")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
        raise ValueError(f"{name} does not hold its own data")
    return dataset


def chunk_filters() -> dict[str, Any]:
    """The filters of a shard's datasets, as keyword arguments of ``create_dataset``."""
    import hdf5plugin

    return {**hdf5plugin.Bitshuffle(cname="lz4"), "fletcher32": True}
