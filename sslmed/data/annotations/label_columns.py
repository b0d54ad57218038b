"""Label and meta columns of a store, when more cells come for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.data.shards.format import LabelColumn, MetaColumn
from sslmed.data.sources.labels import encode_labels, encode_meta

Labelled = tuple[LabelColumn, npt.NDArray[np.int16]]
Described = tuple[MetaColumn, npt.NDArray[Any]]


def merged_labels(
    old: Sequence[Labelled], new: Sequence[Labelled], names: Sequence[str], replace: bool
) -> list[Labelled]:
    """The label columns ``old``, with what ``new`` says of them and the columns that are only there.

    A blank cell changes nothing; another value than the one that is there is an error unless ``replace``.

    Args:
        names: what to call the rows in messages.

    Raises:
        DataError: a column of both contradicts itself.
    """
    columns = {column.name: (column, numbers) for column, numbers in old}
    for column, numbers in new:
        if column.name not in columns:
            columns[column.name] = column, numbers
            continue
        there, came = (_texts(each.classes, values) for each, values in (columns[column.name], (column, numbers)))
        columns[column.name] = encode_labels(
            column.name, _merged(there, came, names, replace, f"label {column.name!r}")
        )
    return list(columns.values())


def merged_meta(
    old: Sequence[Described], new: Sequence[Described], names: Sequence[str], replace: bool
) -> list[Described]:
    """The same of meta columns."""
    columns = {column.name: (column, values) for column, values in old}
    for column, values in new:
        if column.name not in columns:
            columns[column.name] = column, values
            continue
        there, came = _cells(*columns[column.name]), _cells(column, values)
        columns[column.name] = encode_meta(
            column.name, _merged(there, came, names, replace, f"meta column {column.name!r}")
        )
    return list(columns.values())


def _merged(there: Sequence[str], came: Sequence[str], names: Sequence[str], replace: bool, what: str) -> list[str]:
    for name, old, new in zip(names, there, came, strict=True):
        if old and new and old != new and not replace:
            raise DataError(
                f"the store has {what} already: {old!r} of {name}, not {new!r}. Give --replace to put what is new in "
                "its place, or give the column another name."
            )
    return [new or old for old, new in zip(there, came, strict=True)]


def _texts(classes: Sequence[str], numbers: npt.NDArray[Any]) -> list[str]:
    return [classes[number] if number >= 0 else "" for number in numbers.tolist()]


def _cells(column: MetaColumn, values: npt.NDArray[Any]) -> list[str]:
    if column.kind == "category":
        return _texts(column.categories, values)
    return ["" if np.isnan(value) else repr(value) for value in values.tolist()]
