"""What the values in mask files mean: classes, and what is to be ignored."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError

VOID = 255  # PASCAL VOC's word for pixels that nobody can tell, where it is not the only class
MOST_NAMES = VOID

Present = npt.NDArray[np.bool_]  # (256,) which values occur


class Legend(NamedTuple):
    """Class names, and the value that each has in the files; ``named`` where somebody gave the names.

    255 is ignored when it is no value of a class.
    """

    classes: tuple[str, ...]
    values: tuple[int, ...]
    named: bool


def legend(
    came: Present, kept: Present, earlier: Legend | None, names: Sequence[str] = (), replace: bool = False
) -> Legend:
    """What the values of a set of masks mean.

    255 is ignored, unless it is the only value beside 0: then it is class 1. Without names the classes are the values
    that occur, named by their numbers; 0 is always among them.

    Args:
        came, kept: values of the masks that are new, and of those that the store had and keeps.
        earlier: what the masks that the store had meant.
        names: names of the values 0, 1, ..., or of 0 and the only other value; by default those that were given before.
        replace: let names change.

    Raises:
        DataError: more values than names, 255 that means two things, or names that contradict those in the store.
    """
    _check_void(came, kept)
    if earlier is not None and earlier.named and not replace:
        if names and tuple(names) != earlier.classes:
            raise DataError(
                f"the masks in the store have the classes {_list(earlier.classes)}, not {_list(names)}. "
                "Give the same names, or --replace to rename them."
            )
        names = earlier.classes
    present = came | kept
    if _foreground(present):
        found = [0, VOID]
    else:
        found = sorted({0, *(int(value) for value in np.flatnonzero(present[:VOID]))})
    if not names:
        return Legend(("0", "1") if found == [0, VOID] else tuple(map(str, found)), tuple(found), False)
    if len(found) == len(names) == 2:
        return Legend(tuple(names), tuple(found), True)
    if found[-1] >= len(names):
        raise DataError(
            f"there are {len(names)} names of mask classes ({_list(names)}), of the values 0 to {len(names) - 1}, "
            f"but the masks hold the values {_list(found)}. Give a name for each value."
        )
    return Legend(tuple(names), tuple(range(len(names))), True)


def _foreground(present: Present) -> bool:
    """Whether 255 is a class: it occurs, and no other value but 0 does."""
    return bool(present[VOID]) and not present[1:VOID].any()


def _check_void(came: Present, kept: Present) -> None:
    """Refuse masks that would change what 255 means in others."""
    together = _foreground(came | kept)
    changed = kept[VOID] and _foreground(kept) != together
    doubtful = _foreground(came) and not together and not kept[VOID]
    if changed or doubtful:
        raise DataError(
            f"the masks in the store hold the values {_list(np.flatnonzero(kept))}, the new ones "
            f"{_list(np.flatnonzero(came))}: is 255 the foreground, or to be ignored? "
            "Save all masks with the same values, or give all at once with --replace."
        )


def _list(names: Sequence[Any] | npt.NDArray[Any], most: int = 12) -> str:
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")
