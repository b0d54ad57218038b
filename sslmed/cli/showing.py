"""How a verb's result is printed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sslmed.console import process_rank


class Result(Protocol):
    """What every command returns."""

    @property
    def next(self) -> str:
        """The exact command to go on with."""

    def lines(self) -> list[str]:
        """The result for people."""

    def as_dict(self) -> dict[str, Any]:
        """The result for programs."""


def show(result: Result, as_json: bool, shared: bool = False) -> None:
    """Print a result for people, or as one JSON object.

    Args:
        shared: several processes have it, if a launcher has started several; the first prints it.
    """
    if shared and process_rank():
        return
    if as_json:
        text = json.dumps(_plain(result.as_dict()), allow_nan=False)
    else:
        text = "\n".join([*result.lines(), f"next: {result.next}"])
    print(text, flush=True)  # now, so that a reader that has gone is noticed where it is handled


def _plain(value: object) -> object:
    """JSON has neither NaN nor paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
