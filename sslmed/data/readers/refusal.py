"""Refusing a file in a few words, and what a file may claim before anything is allocated for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.config import DataError, MissingDependencyError

PIXEL_LIMIT = 2**28  # 16384 x 16384: above every radiograph and photo, far below what fills a memory
BYTE_LIMIT = 2**31
DEFLATE_RATIO = 1032  # the format's greatest possible compression (RFC 1951: 258 bytes from 2 bits)

Pixels = np.ndarray[Any, np.dtype[Any]]


class RefusedError(Exception):
    """Why a file is refused, in a few words; `sslmed.data.readers.read` adds the file."""


def check_size(*shape: int) -> None:
    """Refuse a claimed shape, such as (height, width), that is empty or too large.

    Raises:
        RefusedError: a side is less than 1, or all together are more than ``PIXEL_LIMIT`` pixels.
    """
    claim = " x ".join(str(side) for side in shape)
    if min(shape) < 1:
        raise RefusedError(f"claims {claim} pixels")
    pixels = 1
    for side in shape:
        pixels *= int(side)
    if pixels > PIXEL_LIMIT:
        raise RefusedError(f"claims {claim} pixels; allowed: at most {PIXEL_LIMIT} altogether")


def check_bytes(size: int) -> None:
    """Refuse to hold ``size`` bytes at once.

    Raises:
        RefusedError: more than ``BYTE_LIMIT``.
    """
    if size > BYTE_LIMIT:
        raise RefusedError(f"has {size} bytes; allowed: at most {BYTE_LIMIT}")


def whole(path: Path) -> bytes:
    """The bytes of a file that is not too large to hold."""
    check_bytes(path.stat().st_size)
    return path.read_bytes()  # not cv2.imread, which opens no path outside ASCII on some systems


@contextmanager
def one_error(path: Path) -> Iterator[None]:
    """Whatever is raised inside becomes a `DataError` that names the file, but for a library that is missing."""
    try:
        yield
    except DataError:
        raise
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{path}: {error}") from None
    except ModuleNotFoundError:  # of a library that everyone needs: the installation is broken, not the file
        raise
    except RefusedError as refusal:
        raise DataError(f"{path}: {refusal}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a decoder may raise anything on a hostile file, and one must not end an ingest
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise DataError(f"{path}: damaged ({why})") from error
