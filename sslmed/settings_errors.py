"""What is wrong with settings, in one sentence each: what was given and what is allowed, read from the field itself."""

import difflib
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Path = tuple[str, ...]


def problems(
    model: type[BaseModel], given: Mapping[str, Any], error: ValidationError, elsewhere: Mapping[str, str]
) -> list[tuple[Path, str]]:
    """One (path below the model, text) for each wrong setting in ``given``; the text goes on after ``'path' ``.

    ``elsewhere`` maps the keys of the other sections to their full names, for a key that stands in the wrong place.
    """
    found: dict[Path, str] = {}  # a union reports once for each of its members
    for detail in error.errors(include_url=False):
        path, field = _locate(model, detail["loc"])
        if detail["type"] == "extra_forbidden":
            found[path] = unknown(path[-1], _level(model, path).model_fields, elsewhere)
        else:
            found.setdefault(path, _sentence(path, field, given, dict(detail)))
    return list(found.items())


def unknown(key: str, allowed: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """The sentence about a key that does not exist, with the nearest one that does."""
    if key in elsewhere:
        return f"is not a known key; did you mean '{elsewhere[key]}'?"
    names = list(allowed)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(names)}"
    return f"is not a known key; {hint}"


def unknown_choice(value: object, choices: Iterable[str]) -> str:
    """The sentence about a name that is not in the dictionary of names."""
    names = list(choices)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    return f"is {_shown(value)}; " + (f"did you mean '{near[0]}'?" if near else f"allowed: {_either(names)}")


def _locate(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[Path, FieldInfo | None]:
    """The path as the user wrote it: pydantic's also names union members and list positions."""
    path: list[str] = []
    field: FieldInfo | None = None
    level: type[BaseModel] | None = model
    for part in map(str, location):
        if level is None:
            break
        path.append(part)
        field = level.model_fields.get(part)
        annotation = field.annotation if field else None
        level = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return tuple(path), field


def _sentence(path: Path, field: FieldInfo | None, given: Mapping[str, Any], detail: Mapping[str, Any]) -> str:
    if detail["type"] == "missing" and field is not None and len(detail["loc"]) == len(path):
        return f"is missing; allowed: {allowed(field)}"
    if detail["type"] in ("value_error", "assertion_error") or field is None:
        reason = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return f"is {_shown(_at(given, path))}; {reason}" if path else f"is refused: {reason}"
    return f"is {_shown(_at(given, path))}; allowed: {allowed(field)}"


def _at(given: object, path: Path) -> object:
    """The whole value as given; pydantic reports only the item of a list that is wrong."""
    for part in path:
        given = given.get(part) if isinstance(given, Mapping) else given
    return given


def _level(model: type[BaseModel], path: Path) -> type[BaseModel]:
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return model


def allowed(field: FieldInfo) -> str:
    """What a setting takes, such as ``a whole number above 0``."""
    return _type(field.annotation, field.metadata)


def _type(annotation: Any, metadata: Iterable[object] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [item.metadata if isinstance(item, FieldInfo) else [item] for item in arguments[1:]]
        return _type(arguments[0], [*metadata, *chain(*inner)])
    if origin in (Union, UnionType):
        return _either([_type(one, metadata) for one in arguments if one is not NoneType])
    if origin is Literal:
        return _either([str(one) for one in arguments])
    if origin in (tuple, list):
        return _sequence(arguments)
    return _NAMES.get(annotation, "text") + (_bounds(metadata) if annotation in (int, float) else "")


def _sequence(arguments: tuple[Any, ...]) -> str:
    if len(arguments) == 1 or arguments[1] is Ellipsis:
        return f"a list, each {_type(arguments[0])}"
    kinds = list(dict.fromkeys(_type(one) for one in arguments))
    return f"a list of {len(arguments)}, each {_either(kinds)}"


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _bounds(metadata: Iterable[object]) -> str:
    words = []
    for bound in metadata:
        if isinstance(bound, Gt):
            words.append(f"above {bound.gt}")
        elif isinstance(bound, Ge):
            words.append(f"at least {bound.ge}")
        elif isinstance(bound, Lt):
            words.append(f"below {bound.lt}")
        elif isinstance(bound, Le):
            words.append(f"at most {bound.le}")
    return " " + " and ".join(words) if words else ""


def _either(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: object) -> str:
    """The value as a recipe would show it, cut to what fits on a line."""
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
