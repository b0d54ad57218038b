"""The files of a folder: which a reader may know, which it does not, and which lie elsewhere."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from sslmed.config import DataError, MissingInputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".nii", ".nii.gz", ".npy", ".npz"})


@dataclass(frozen=True)
class Listing:
    """The files under a folder, or the one file, each list sorted by path.

    Attributes:
        images: files that a reader may know, by their suffix or DICOM's magic.
        others: all other files, also what is no file at all (a pipe, a device, a link to nothing).
        outside: links to files or folders that lie outside the source; never opened.
    """

    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    outside: list[Path] = field(default_factory=list)


def find(source: Path) -> list[Path]:
    """The files under ``source`` that a reader may know, sorted; see `listing`."""
    return listing(source).images


def listing(source: Path) -> Listing:
    """List a folder, or one file.

    DICOM files often have no suffix, the end of a number for one, or a maker's (Siemens: .IMA): they are known by the
    magic in their content, whatever they are called.
    Hidden files and folders (a leading dot) are in no list. A link to a folder within the source is followed, each
    folder once. A link that leads out of the source is not: who may read this folder need not be meant to read that
    one. The source itself may be a link.

    Raises:
        MissingInputError: ``source`` does not exist.
        DataError: a folder in it cannot be read.
    """
    if source.is_file():
        return Listing([source], []) if _known(source) else Listing([], [source])
    if not source.is_dir():
        raise MissingInputError(f"{source} does not exist; give a folder of images or one image file")
    found, visited, top = Listing(), set[str](), Path(os.path.realpath(source))
    for folder, folders, files in os.walk(source, onerror=_refuse_folder, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # a link that leads back up would never end
            folders.clear()
            continue
        visited.add(place)
        seen = sorted(Path(folder, name) for name in folders if not name.startswith("."))
        found.outside.extend(path for path in seen if _leaves(path, top))
        folders[:] = [path.name for path in seen if not _leaves(path, top)]
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if _leaves(path, top):
                found.outside.append(path)
            else:
                (found.images if _known(path) else found.others).append(path)
    for paths in (found.images, found.others, found.outside):
        paths.sort()
    return found


def _leaves(path: Path, top: Path) -> bool:
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(top)


def _known(path: Path) -> bool:
    if not path.is_file():  # opening a pipe would wait for ever
        return False
    if path.name.lower().endswith(tuple(SUFFIXES)):
        return True
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be read: {error.strerror}; its images would be missing in silence"
    )
