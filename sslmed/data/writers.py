"""Pixels to PNG, JPEG and TIFF files, whole or not at all."""

from pathlib import Path
from typing import Any

import numpy as np

from sslmed.durable import write_atomically

JPEG_QUALITY = 95


def write_image(path: Path, pixels: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Write (H, W) grey or (H, W, 3) RGB pixels; the suffix of ``path`` says the format.

    PNG and TIFF keep uint8 and uint16 exactly; JPEG takes uint8 and loses a little.

    Raises:
        ValueError: a shape, dtype or suffix that the format cannot hold.
        DiskError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    grey_or_rgb = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    depths = ("uint8",) if suffix in (".jpg", ".jpeg") else ("uint8", "uint16")
    if not grey_or_rgb or pixels.dtype.name not in depths:
        allowed = f"(H, W) or (H, W, 3) of {' or '.join(depths)}"
        raise ValueError(f"{path.name} holds {allowed}, not {pixels.shape} {pixels.dtype}")
    if suffix in (".tif", ".tiff"):
        _write_tiff(path, pixels)
    elif suffix in (".png", ".jpg", ".jpeg"):
        _write_cv2(path, pixels, suffix)
    else:
        raise ValueError(f"{path.name}: allowed suffixes are .png, .jpg, .jpeg, .tif and .tiff")


def _write_tiff(path: Path, pixels: np.ndarray[Any, np.dtype[Any]]) -> None:
    import tifffile

    with write_atomically(path) as partial:
        tifffile.imwrite(partial, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", compression="zlib")


def _write_cv2(path: Path, pixels: np.ndarray[Any, np.dtype[Any]], suffix: str) -> None:
    import cv2

    options = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    done, encoded = cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels, options)
    if not done:
        raise ValueError(f"{path.name}: the encoder refused {pixels.shape} {pixels.dtype}")
    with write_atomically(path) as partial:
        partial.write_bytes(encoded.tobytes())
