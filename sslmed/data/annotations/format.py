"""What ``store.json`` may say of labels, masks and boxes: plain values, and names that stay in the folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sslmed.config import DataError
from sslmed.data.shards.format import STORE_JSON
from sslmed.durable import sha256

VALUES = 256  # a mask holds bytes
LABELS_NAME = re.compile(r"labels-(\d{1,9})\.h5")
MASKS_NAME = re.compile(r"masks-(\d{1,9})\.h5")
MASK_SHARD_NAME = re.compile(r"masks-(\d{1,9})-\d{5}\.h5")
BOXES_NAME = re.compile(r"boxes-(\d{1,9})\.h5")

NAMES = (LABELS_NAME, MASKS_NAME, MASK_SHARD_NAME, BOXES_NAME)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_GROUP = re.compile(r"\d{1,9}x\d{1,9}")


def tables(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files that hold no masks: each with its name and digest."""
    return [entry for entry in (part, part["masks"], part["boxes"]) if entry and entry["file"]]


def verified(path: Path, entry: Mapping[str, Any]) -> list[str]:
    """A finding when the file is not what ``store.json`` says."""
    file = path / entry["file"]
    if not file.is_file() or file.is_symlink():
        return [f"{entry['file']}: missing"]
    return [] if sha256(file) == entry["sha256"] else [f"{entry['file']}: SHA-256 differs"]


def checked(path: Path, part: Any) -> dict[str, Any]:
    """The part of ``store.json``, once nothing in it can lead out of the folder."""
    if part is None:
        return {"generation": 0, "labels": [], "meta": [], "file": None, "sha256": None, "masks": None, "boxes": None}
    try:
        _check_part(part)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path / STORE_JSON} is damaged: its annotations are not what sslmed writes ({error!r}).\n"
            "Ingest the images again."
        ) from error
    return cast(dict[str, Any], part)


def _check_part(part: Mapping[str, Any]) -> None:
    ask = _Ask()
    ask.that(type(part["generation"]) is int and part["generation"] >= 0, "generation")
    for kind, texts in (("labels", "classes"), ("meta", "categories")):
        names = [each["name"] for each in part[kind]]
        ask.texts(names, kind)
        for each in part[kind]:
            ask.texts(each[texts], f"{kind} {each['name']}")
            ask.that(each["kind"] in (("class", "binary") if kind == "labels" else ("number", "category")), "kind")
    ask.that(part["file"] is not None or not (part["labels"] or part["meta"]), "file of the labels")
    if part["file"] is not None:
        ask.file(part, LABELS_NAME)
    if (masks := part["masks"]) is not None:
        ask.file(masks, MASKS_NAME)
        ask.texts(masks["classes"], "mask classes")
        values = masks["values"]
        ask.that(len(values) == len(masks["classes"]) == len(set(values)), "mask values")
        ask.that(all(type(value) is int and 0 <= value < VALUES for value in values), "mask values")
        ask.that(type(masks["named"]) is bool, "mask names")
        ask.that(all(_GROUP.fullmatch(group) for group in masks["groups"]), "mask groups")
        for shard in masks["shards"]:
            ask.file(shard, MASK_SHARD_NAME)
    if (boxes := part["boxes"]) is not None:
        ask.file(boxes, BOXES_NAME)
        ask.texts(boxes["classes"], "box classes")


class _Ask:
    def that(self, right: bool, what: str) -> None:
        if not right:
            raise ValueError(what)

    def texts(self, names: Any, what: str) -> None:
        self.that(isinstance(names, list) and all(type(name) is str for name in names), what)
        self.that(len(set(names)) == len(names), what)

    def file(self, entry: Mapping[str, Any], pattern: re.Pattern[str]) -> None:
        self.that(pattern.fullmatch(entry["file"]) is not None, f"file {entry['file']!r}")
        self.that(_DIGEST.fullmatch(entry["sha256"]) is not None, f"digest of {entry['file']}")
