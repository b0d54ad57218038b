"""``.npz`` files: the images of MedMNIST and its like one by one, or one array.

Such a file may hold a hundred thousand images, so that it is never read whole: each member of the archive is inflated
image by image. zipfile sees a wrong checksum only at the end of a member, which is then an error midway.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sslmed.data.readers.arrays import Claim, array, claim, scan_of
from sslmed.data.readers.refusal import DEFLATE_RATIO, Pixels, RefusedError, check_size
from sslmed.data.scan import Scan

SPLITS = ("train", "val", "test")
_MAGIC = (b"PK\3\4", b"PK\5\6")  # of an archive, and of an empty one
_LABEL_LIMIT = 2**28  # bytes of labels


@dataclass(frozen=True, eq=False)
class _Set:
    """The images of one split, (N, ...), and their labels, a row each; none where the file has none."""

    split: str
    member: zipfile.ZipInfo
    claim: Claim
    labels: Pixels | None


def is_npz(head: bytes) -> bool:
    """Whether a file that begins so is a zip archive."""
    return head.startswith(_MAGIC)


def npz(path: Path) -> tuple[str, Iterator[Scan]]:
    """The scans, and how many of several there are ("4708 images").

    Members ``train_images``, ``val_images`` and ``test_images`` are (N, ...) images, or volumes where each is
    (D, H, W): a scan each with the part "train/0" and so on, its split, and of ``train_labels`` (N, k) the label
    "label", or "label0" to "labelK" where there are several. A file of one other array is as an ``.npy``.

    Raises:
        RefusedError: other arrays, Python objects, an encrypted or impossible archive, claims beyond the file or the
            limits; while iterating: values that are not read, a member that ends too soon or has a wrong checksum.
    """
    with zipfile.ZipFile(path) as archive:
        members = _members(archive)
        known = {f"{split}_{what}" for split in SPLITS for what in ("images", "labels")}
        if len(members) == 1 and not members.keys() & known:
            (member,) = members.values()
            return "", iter([_only(archive, member, path)])
        if members.keys() - known or not any(name.endswith("_images") for name in members):
            raise RefusedError(
                f"holds the arrays {', '.join(sorted(members)[:6]) or '(none)'}; allowed: one, or those of MedMNIST: "
                "train_images, train_labels, and so for val and test"
            )
        if lost := sorted(name for name in members if f"{name.split('_')[0]}_images" not in members):
            raise RefusedError(f"holds {lost[0]} without images")
        sets = [_set(archive, members, split) for split in SPLITS if f"{split}_images" in members]
    total = sum(one.claim.shape[0] for one in sets)
    return f"{total} images" if total > 1 else "", _images(path, sets)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise RefusedError(f"is an archive with {member.filename[:60]!r} in it, not one of NumPy arrays")
        if name in found:
            raise RefusedError(f"holds {name[:60]!r} twice")
        if member.flag_bits & 1:
            raise RefusedError("is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RefusedError("is packed in an unusual way; save it with numpy.savez_compressed")
        if member.file_size > DEFLATE_RATIO * member.compress_size:
            raise RefusedError(
                f"claims {member.file_size} bytes of {name[:60]!r}, more than its {member.compress_size} can hold"
            )
        found[name] = member
    return found


def _claim(file: IO[bytes], member: zipfile.ZipInfo) -> Claim:
    found = claim(file)  # type: ignore[arg-type]
    left = member.file_size - file.tell()
    if found.bytes != left:
        raise RefusedError(f"is damaged: {member.filename[:60]!r} claims {found.bytes} bytes, {left} are there")
    return found


def _only(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Scan:
    with archive.open(member) as file:
        found = _claim(file, member)
        check_size(*found.shape)
        return scan_of(array(_exactly(file, found.bytes), found), path)


def _set(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], split: str) -> _Set:
    member = members[f"{split}_images"]
    with archive.open(member) as file:
        images = _claim(file, member)
    if not 3 <= len(images.shape) <= 4:
        raise RefusedError(f"holds {split}_images of shape {images.shape}; allowed: (N, H, W) or (N, H, W, 3)")
    if images.fortran:
        raise RefusedError(f"holds {split}_images in Fortran order, in which no image is whole; save it in C order")
    check_size(*images.shape[1:])
    if f"{split}_labels" not in members:
        return _Set(split, member, images, None)
    return _Set(split, member, images, _labels(archive, members[f"{split}_labels"], images.shape[0], split))


def _labels(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int, split: str) -> Pixels:
    """(N, k) whole numbers."""
    with archive.open(member) as file:
        found = _claim(file, member)
        if found.bytes > _LABEL_LIMIT or len(found.shape) > 2 or found.shape[0] != count:
            raise RefusedError(f"holds {split}_labels of shape {found.shape} for {count} images; allowed: (N, k)")
        values = array(_exactly(file, found.bytes), found).reshape(count, -1)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise RefusedError(f"holds {split}_labels that are no whole numbers")
    return values


def _images(path: Path, sets: list[_Set]) -> Iterator[Scan]:
    with zipfile.ZipFile(path) as archive:
        for one in sets:
            with archive.open(one.member) as file:
                _claim(file, one.member)
                each = Claim(one.claim.shape[1:], one.claim.dtype, fortran=False)
                for number in range(one.claim.shape[0]):
                    values = array(_exactly(file, each.bytes), each)
                    known: dict[str, Any] = {"part": f"{one.split}/{number}", "split": one.split}
                    if one.labels is not None:
                        known["labels"] = _named(one.labels[number])
                    yield scan_of(values, path, **known)
                file.read(1)  # the end, where the checksum is


def _named(labels: Pixels) -> dict[str, str]:
    if len(labels) == 1:
        return {"label": str(int(labels[0]))}
    return {f"label{number}": str(int(value)) for number, value in enumerate(labels)}


def _exactly(file: IO[bytes], size: int) -> bytes:
    values = file.read(size)
    if len(values) < size:
        raise RefusedError("is truncated")
    return values
