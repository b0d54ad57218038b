"""The size of a network's input: one number for a square, or height and width."""

from typing import Annotated

from pydantic import Field

Side = Annotated[int, Field(ge=16, le=4096)]
ImageSize = Side | tuple[Side, Side]


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width, pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def in_words(size: ImageSize) -> str:
    """``96 x 128``: height, then width."""
    return "{} x {}".format(*sides(size))
