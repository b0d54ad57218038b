"""A CSV as a header and checked lines, before anyone asks what its columns mean."""

import csv
from collections.abc import Sequence
from pathlib import Path

from sslmed.config import DataError, MissingInputError


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the (line number, cells) of a CSV, all stripped; blank lines are left out.

    Raises:
        MissingInputError: there is no such file.
        DataError: not UTF-8, not separated by commas, a column twice, or a line with another number of cells.
    """
    if not path.is_file():
        raise MissingInputError(f"no CSV at {path}.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [
                (reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))
            ]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Save it as 'CSV UTF-8'.") from error
    except (csv.Error, OSError) as error:
        raise DataError(f"{path} is not a CSV that can be read: {error}.") from error
    if not lines:
        raise DataError(f"{path} is empty. Its first line must name the columns: file, patient, label:NAME.")
    header = lines[0][1]
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(f"{path} separates its columns with {other!r}. Save it with commas.")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path} has the column {twice[0]!r} more than once. Rename or remove one.")
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells, but {len(header)} columns. Quote cells that hold commas."
            )
    return header, lines[1:]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, quoted, and how many more there are."""
    shown = ", ".join(repr(name) if len(name) <= 80 else repr(name[:77] + "...") for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
