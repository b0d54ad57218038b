"""Masks held against their images: of one size, and of one place in the patient."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.data.annotations.matching import Finder, files_below
from sslmed.data.readers.refusal import Pixels, RefusedError
from sslmed.data.scan import Scan

SUFFIXES = (".png", ".tif", ".tiff", ".nii", ".nii.gz", ".npy", ".dcm")
MM_TOLERANCE = 0.01  # between the corners of a mask's grid and its image's: files round their directions

Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Matches:
    """Which mask is whose.

    Attributes:
        masks: mask file by the name of its image.
        strays: masks that no image goes with, by their names in the folder.
        outside: names of links that lead out of the folder.
    """

    masks: Mapping[str, Path]
    strays: tuple[str, ...]
    outside: tuple[str, ...]


def is_mask(name: str) -> bool:
    """Whether a file may hold a mask, going by its name; a JPEG may, so that it is refused and not passed over."""
    return name.lower().endswith((*SUFFIXES, ".jpg", ".jpeg"))


def match_masks(directory: Path, names: Mapping[str, str]) -> Matches:
    """Find the mask of each image; see `Finder` for which names go together.

    Args:
        directory: the folder of the masks.
        names: of the images, and of folders that are one image (a series), each with the name of the image it means.

    Raises:
        DataError: an image with two masks, or a mask that may be of several images; both are named.
    """
    finder = Finder(names)
    found, outside = files_below(directory)
    masks: dict[str, Path] = {}
    called: dict[str, str] = {}
    strays = []
    for name, path in found:
        if not is_mask(name):
            continue
        images = sorted({names[image] for image in finder.find(name)})
        if len(images) > 1:
            raise DataError(
                f"{path} may be the mask of {images[0]!r} or of {images[1]!r}. "
                "Give each mask the path and name of its image, but for the suffix."
            )
        if not images:
            strays.append(name)
        elif images[0] in masks:
            raise DataError(
                f"{called[images[0]]!r} and {name!r} in {directory} are both masks of {images[0]!r}. Keep one of them; "
                "several objects belong into one mask, as numbers."
            )
        else:
            masks[images[0]], called[images[0]] = path, name
    return Matches(masks, tuple(strays), tuple(outside))


def onto(mask: Scan, depth: int, size: tuple[int, int], affine: Affine | None) -> Pixels:
    """The mask on the grid of its image as it was read, (depth, H, W).

    A mask of a volume may have its axes in another order or direction: it is turned until its voxels lie where the
    image's do. It is never interpolated.

    Args:
        depth: how many slices the image has; 1 of a picture.
        size: its height and width.
        affine: from its (d, h, w, 1) to mm, see `Scan.affine`; None where it is not placed in the patient.

    Raises:
        RefusedError: another size, or another place.
    """
    shape = (depth, *size)
    pixels = mask.pixels if mask.pixels.ndim == 3 else mask.pixels[None]
    if mask.affine is None or affine is None:
        if mask.kind == "volume" and mask.affine is not None:
            raise RefusedError("is placed in the patient, but its image is not, so that their axes cannot be compared")
        if pixels.shape != shape:
            raise RefusedError(f"has {_words(pixels.shape)} pixels, but its image has {_words(shape)}")
        return pixels
    turned, matrix = _turned(pixels, mask.affine, affine)
    if turned.shape != shape:
        raise RefusedError(
            f"has {_words(turned.shape)} voxels of {_spacing(matrix)} mm, but its image has {_words(shape)} of "
            f"{_spacing(affine)} mm (slices x rows x columns)"
        )
    corners = np.array([(*(np.array(shape) - 1) * bits, 1) for bits in np.ndindex(2, 2, 2)], np.float64)
    apart = float(np.linalg.norm(corners @ (matrix - affine)[:3].T, axis=1).max())
    if apart > MM_TOLERANCE:
        raise RefusedError(
            f"lies up to {apart:.3g} mm away from its image: it starts at {_place(matrix)} mm with voxels of "
            f"{_spacing(matrix)} mm, the image at {_place(affine)} mm with {_spacing(affine)} mm"
        )
    return turned


def before_shrinking(affine: Affine, source: tuple[int, int], stored: tuple[int, int]) -> Affine:
    """The affine of an image of height and width ``source``, from that of the same image shrunk to ``stored``.

    Shrinking keeps the outer edges, so that the centre of stored pixel i lies at (i + 1/2) * source / stored - 1/2.
    """
    matrix = affine.copy()
    for axis, (whole, small) in enumerate(zip(source, stored, strict=True), start=1):
        matrix[:3, axis] *= small / whole
        matrix[:3, 3] -= matrix[:3, axis] * (whole / small - 1) / 2
    return matrix


def shrunk(mask: Pixels, size: tuple[int, int]) -> Pixels:
    """The mask (H, W) with height and width ``size``: of each new pixel the value that lies at its centre."""
    if mask.shape == size:
        return mask
    down, across = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return np.ascontiguousarray(mask[np.ix_(down, across)])


def _turned(pixels: Pixels, own: Affine, image: Affine) -> tuple[Pixels, Affine]:
    """The mask with its axes in the order and direction of the image's, and the affine that it has then."""
    cosines = np.linalg.inv(image[:3, :3] / np.linalg.norm(image[:3, :3], axis=0)) @ (
        own[:3, :3] / np.linalg.norm(own[:3, :3], axis=0)
    )
    order = np.abs(cosines).argmax(axis=1)  # for each axis of the image the mask's that lies along it
    if sorted(order) != [0, 1, 2]:
        return pixels, own
    turned, matrix = pixels.transpose(order), own[:, [*order, 3]].copy()
    for axis in range(3):
        if cosines[axis, order[axis]] < 0:
            turned = np.flip(turned, axis)
            matrix[:, 3] += matrix[:, axis] * (turned.shape[axis] - 1)
            matrix[:, axis] *= -1
    return np.ascontiguousarray(turned), matrix


def _words(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[1:] if shape[0] == 1 else shape))


def _spacing(affine: Affine) -> str:
    return " x ".join(f"{side:.4g}" for side in np.linalg.norm(affine[:3, :3], axis=0))


def _place(affine: Affine) -> str:
    return "({})".format(", ".join(f"{value:.4g}" for value in affine[:3, 3]))
