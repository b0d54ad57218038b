"""Which image does another file mean? Masks and boxes call their images by names that are almost the same."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from sslmed.data.sources.labels import relative_name

_SUFFIX = re.compile(r"(\.nii\.gz|\.(png|jpe?g|tiff?|bmp|dcm|nii|np[yz]|xml|json))$", re.IGNORECASE)
# What people add to a name, on either side, and the folders that only say what is inside.
_OF_A_MASK = re.compile(r"(^|[ _.-])(masks?|segmentations?|segs?|labels?|annotations?|gt)$", re.IGNORECASE)
_OF_AN_IMAGE = re.compile(r"(^|[ _.-])(images?|img|0000)$", re.IGNORECASE)  # nnU-Net numbers its channels from _0000
_FOLDER = re.compile(
    r"(images?|imgs?|masks?|segmentations?|segs?|labels?|annotations?|gt)([_-]?(tr|ts|train|val|test))?", re.IGNORECASE
)


def bare(name: str) -> str:
    """A name without the suffix of its format."""
    return _SUFFIX.sub("", name)


class Finder:
    """Finds the image that another name means.

    Four steps, and the first that finds something counts: the same name; the same but for the format; the same but for
    words like ``_mask``, ``_seg`` or ``_label`` and folders like ``images`` and ``masks``; the same without any folder,
    where one of the two lies in none.

    Args:
        names: of the images, relative to their folder.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._same: dict[str, str] = {}
        self._bare: dict[str, list[str]] = {}
        self._plain: dict[str, list[str]] = {}
        self._stem: dict[str, list[str]] = {}
        for name in dict.fromkeys(names):
            self._same[name] = name
            self._bare.setdefault(bare(name), []).append(name)
            self._plain.setdefault(_plain(name, _OF_AN_IMAGE), []).append(name)
            self._stem.setdefault(PurePosixPath(_plain(name, _OF_AN_IMAGE)).name, []).append(name)

    def find(self, name: str) -> list[str]:
        """The images that ``name`` may mean: none, one, or several when it cannot be told."""
        for same in (name, bare(name)):  # a.jpg.png is the mask of a.jpg
            if same in self._same:
                return [same]
        plain = _plain(name, _OF_A_MASK)
        stem = PurePosixPath(plain)
        flat = str(stem.parent) == "."
        return (
            self._bare.get(bare(name))
            or self._plain.get(plain)
            or [image for image in self._stem.get(stem.name, []) if flat or _flat(image)]
        )


def files_below(folder: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """The files under a folder by their relative names, sorted, and the names of links that lead out of it.

    Hidden files and folders are left out.
    """
    real = Path(os.path.realpath(folder))
    found: list[tuple[str, Path]] = []
    outside: list[str] = []
    for place, folders, files in os.walk(folder):
        links = [Path(place, name) for name in folders if Path(place, name).is_symlink()]  # os.walk follows none
        away = [link for link in links if not Path(os.path.realpath(link)).is_relative_to(real)]
        outside += [relative_name(link.relative_to(folder)) for link in away]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            path = Path(place, file)
            if file.startswith("."):
                continue
            name = relative_name(path.relative_to(folder))
            if Path(os.path.realpath(path)).is_relative_to(real):
                found.append((name, path))
            else:
                outside.append(name)
    return sorted(found), sorted(outside)


def _plain(name: str, words: re.Pattern[str]) -> str:
    path = PurePosixPath(bare(name))
    folders = [part for part in path.parts[:-1] if not _FOLDER.fullmatch(part)]
    stem = words.sub("", path.name)  # nothing is left of case7/seg.nii.gz, which goes with case7/image.nii.gz
    return "/".join([*folders, *([stem] if stem or not folders else [])]) or path.name


def _flat(name: str) -> bool:
    return "/" not in _plain(name, _OF_AN_IMAGE)
