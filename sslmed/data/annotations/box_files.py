"""COCO JSON and Pascal VOC XML to drawings: what is said of each image, checked as far as the file alone allows."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.parsers import expat

from sslmed.config import DataError, MissingInputError
from sslmed.data.annotations.boxes import Drawing, Drawings
from sslmed.data.annotations.matching import files_below
from sslmed.data.readers.refusal import RefusedError, one_error
from sslmed.data.sources.labels import relative_name

COCO_BYTES = 2**29
VOC_BYTES = 2**24
_DEPTH = 32  # of nested elements

Corners = tuple[float, float, float, float]


def read_boxes(path: Path) -> Drawings:
    """Read a COCO JSON file, or every VOC XML file under a folder (or one).

    Raises:
        MissingInputError: there is nothing at ``path``.
        DataError: it cannot be read as what it is: damaged, hostile, of another form, without a class name.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise MissingInputError(f"no boxes at {path}: give a COCO JSON file, or a folder of Pascal VOC XML files.")
    if path.suffix.lower() == ".xml":
        drawings = (voc(path, path.name),)
        return Drawings(drawings, _classes(drawings))
    with one_error(path):
        return _coco(_json(path), path.name)


def voc(path: Path, name: str) -> Drawing:
    """One VOC file; ``name`` is its path relative to the folder of all.

    Raises:
        DataError: no XML, one with a DOCTYPE (which could make it grow without end), or not VOC's.
    """
    with one_error(path):
        if path.stat().st_size > VOC_BYTES:
            raise RefusedError(f"has {path.stat().st_size} bytes; allowed: at most {VOC_BYTES}")
        image, objects = _elements(path.read_bytes())
        names = [name]
        if image.get("filename"):
            names.append(relative_name(str(Path(name).with_name(_last(image["filename"])))))
        try:
            size = (int(float(image["height"])), int(float(image["width"])))
        except (KeyError, ValueError, OverflowError):
            size = (0, 0)
        classes, corners, fault = [], [], ""
        for each in objects:
            if not each.get("name"):
                raise RefusedError("has an object without a class name")
            try:
                left, top, right, bottom = (float(each[edge]) for edge in ("xmin", "ymin", "xmax", "ymax"))
            except (KeyError, ValueError):
                fault = f"has an object {each['name']!r} without four numbers xmin, ymin, xmax, ymax"
                continue
            classes.append(each["name"])
            # Pixels count from 1 and both ends belong to the box: reversed ones have to stay reversed.
            corners.append(
                (left - 1, top - 1, right, bottom) if right >= left and bottom >= top else (left, top, right, bottom)
            )
        return Drawing(name, tuple(names), size if min(size) > 0 else None, tuple(corners), tuple(classes), fault)


def _folder(path: Path) -> Drawings:
    files, outside = files_below(path)
    found = [_voc_or_fault(file, name) for name, file in files if name.lower().endswith(".xml")]
    found += [Drawing(name, (name,), None, fault="is a link that leads out of the folder") for name in outside]
    if not found:
        kinds = ", ".join(sorted({Path(name).suffix or "no suffix" for name, _ in files})[:5]) or "nothing"
        raise DataError(f"no Pascal VOC XML file under {path}: found {kinds}. A COCO JSON is given as a file.")
    return Drawings(tuple(found), _classes(found))


def _voc_or_fault(path: Path, name: str) -> Drawing:
    try:
        return voc(path, name)
    except DataError as error:  # one bad file of many
        return Drawing(name, (name,), None, fault=str(error).removeprefix(f"{path}: "))


def _classes(drawings: Iterable[Drawing]) -> tuple[str, ...]:
    return tuple(sorted({name for drawing in drawings for name in drawing.classes}))


def _elements(content: bytes) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What VOC says of the image, and of each object, by the last words of their paths. Whatever else stands there is
    left out, such as the parts of an object."""
    image: dict[str, str] = {}
    objects: list[dict[str, str]] = []
    place: list[str] = []
    text: list[str] = []

    def start(tag: str, _: Any) -> None:
        place.append(tag)
        if len(place) > _DEPTH:
            raise RefusedError(f"nests more than {_DEPTH} elements")
        if len(place) == 1 and tag != "annotation":
            raise RefusedError(f"begins with <{tag}>; Pascal VOC begins with <annotation>")
        if place == ["annotation", "object"]:
            objects.append({})
        text.clear()

    def end(tag: str) -> None:
        said = "".join(text).strip()
        text.clear()
        within = tuple(place[1:-1])
        if within in ((), ("size",)):
            image[tag] = said
        elif within in (("object",), ("object", "bndbox")):
            objects[-1][tag] = said
        place.pop()

    def refuse(*_: Any) -> None:
        raise RefusedError("declares a DOCTYPE or entities, which are not read")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text.append
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise RefusedError(f"is no XML: {error}") from None
    return image, objects


def _json(path: Path) -> Any:
    if path.stat().st_size > COCO_BYTES:
        raise RefusedError(f"has {path.stat().st_size} bytes; allowed: at most {COCO_BYTES}")

    def refuse(word: str) -> None:
        raise RefusedError(f"holds {word}, which is no number of JSON")

    try:
        return json.loads(path.read_bytes(), parse_constant=refuse)
    except RecursionError:
        raise RefusedError("nests too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError, and numbers of very many digits
        raise RefusedError(f"is no JSON: {str(error)[:120]}") from None


def _coco(content: Any, name: str) -> Drawings:
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list) for part in ("images", "annotations", "categories")
    ):
        raise RefusedError("is not COCO's: it needs the lists images, annotations and categories")
    for part in ("images", "annotations", "categories"):
        if not all(isinstance(entry, dict) for entry in content[part]):
            raise RefusedError(f"is not COCO's: {part} holds something that is no object")
    categories = _categories(content["categories"])
    files = _images(content["images"])
    objects: dict[Any, list[tuple[str, Corners]]] = {number: [] for number in files}
    faults: dict[Any, str] = {}
    crowds, strays = 0, 0
    crowded: set[Any] = set()
    for entry in content["annotations"]:
        number = _key(entry.get("image_id"), "an annotation's image_id")
        if number not in files:
            strays += 1
            continue
        if entry.get("iscrowd"):
            crowds += 1
            crowded.add(number)
            continue
        category = _key(entry.get("category_id"), "an annotation's category_id")
        corners = _corners(entry.get("bbox"))
        if category not in categories:
            faults.setdefault(number, f"has an object of category {category!r}, which is not among the categories")
        elif isinstance(corners, str):
            faults.setdefault(number, corners)
        else:
            objects[number].append((categories[category], corners))
    drawings = tuple(
        Drawing(
            f"{name}: {file}",
            (file,),
            size,
            tuple(corners for _, corners in objects[number]),
            tuple(category for category, _ in objects[number]),
            faults.get(number, ""),
        )
        for number, (file, size) in files.items()
        if objects[number] or number in faults or number not in crowded  # of nothing but crowds nothing is known
    )
    return Drawings(drawings, tuple(sorted(categories.values())), crowds, strays)


def _categories(entries: Iterable[Mapping[str, Any]]) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for entry in entries:
        number, name = _key(entry.get("id"), "a category's id"), entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise RefusedError(f"has the category {number!r} without a name")
        if number in found or name.strip() in found.values():
            raise RefusedError(f"has the category {number!r} or the name {name!r} twice")
        found[number] = name.strip()
    return found


def _images(entries: Iterable[Mapping[str, Any]]) -> dict[Any, tuple[str, tuple[int, int] | None]]:
    found: dict[Any, tuple[str, tuple[int, int] | None]] = {}
    for entry in entries:
        number, file = _key(entry.get("id"), "an image's id"), entry.get("file_name")
        if not isinstance(file, str) or not file.strip():
            raise RefusedError(f"has the image {number!r} without a file_name")
        if number in found:
            raise RefusedError(f"has the image {number!r} twice")
        height, width = _side(entry.get("height")), _side(entry.get("width"))
        size = (height, width) if height and width else None
        found[number] = relative_name(file.strip().replace("\\", "/")), size
    return found


def _corners(bbox: Any) -> Corners | str:
    if bbox is None or bbox == []:
        return "has an object without a bbox (only a segmentation)"
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return f"has a bbox that is no list of four numbers: {str(bbox)[:60]}"
    try:
        left, top, width, height = map(float, bbox)
    except OverflowError:
        return "has a bbox that is not finite"
    return left, top, left + width, top + height


def _side(value: Any) -> int | None:
    return int(value) if _is_number(value) and 1 <= value < 2**31 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key(value: Any, what: str) -> Any:
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise RefusedError(f"is not COCO's: {what} is {str(value)[:60]!r}, no number or text")
    return value


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path
