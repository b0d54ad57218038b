"""The list of a folder's files with their digests: what it may name, and what on disk does not match it."""

import json
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sslmed.config import DataError
from sslmed.durable import sha256

MANIFEST = "MANIFEST.json"
LARGEST = 1_000_000  # bytes of a manifest; a line a file takes about 100
MOST_FILES = 64
MOST_DEEP = 4_000_000  # bytes of JSON that is parsed at all: a card with every score of a large comparison has a tenth

REQUIRED = ("card.json", "fingerprint.safetensors", "model.safetensors", "selftest.safetensors")
# What an artifact may hold: nothing that its reader would have to run, as a pickle does.
KINDS = (".safetensors", ".json", ".md", ".txt")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")  # a plain name: no separator, no drive, not hidden
_DIGEST = re.compile(r"[0-9a-f]{64}")


def parse(content: bytes) -> dict[str, str]:
    """The sha256 of each file by its name, as a manifest has them.

    Raises:
        ValueError: it is no manifest, or names what it must not: another folder, a hidden file, itself, one file twice.
    """
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    try:
        pairs = json.loads(content.decode("utf-8"), object_pairs_hook=_Pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(pairs, _Pairs):
        raise ValueError("it is not a list of names and digests")
    if not 0 < len(pairs) <= MOST_FILES:
        raise ValueError(f"it names {len(pairs)} files; allowed: 1 to {MOST_FILES}")
    found: dict[str, str] = {}
    for name, digest in pairs:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"it names {name[:80]!r}, which is no plain file name")
        if name in found:
            raise ValueError(f"it names {name} twice")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"what it has for {name} is no sha256")
        found[name] = digest
    return found


def gaps(names: Collection[str]) -> list[str]:
    """What keeps files of these names from being an artifact, a line each."""
    lacking = [f"{name} is not in the manifest" for name in REQUIRED if name not in names]
    return lacking + [f"{name} is of a kind that no artifact holds" for name in names if not name.endswith(KINDS)]


def damage(folder: Path, artifact: bool = True) -> list[str]:
    """What does not match the manifest, a line a file; empty when the folder is whole. Nothing is changed.

    Files that the manifest does not name count too, but hidden ones, such as .gitattributes. Symbolic links are not
    followed: what they lead to may change, or lie anywhere.

    Args:
        artifact: whether it also has to hold what an artifact does, and nothing else.
    """
    try:
        digests = parse(_read(folder / MANIFEST, LARGEST))
    except ValueError as error:
        return [f"{MANIFEST} is not readable: {error}"]
    found = [line for name, digest in digests.items() if (line := _differs(folder / name, digest))]
    listed = {MANIFEST, *digests}
    try:
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        return [*found, f"{folder.name} is not readable: {error.strerror}"]
    found += [f"{name} is not in the manifest" for name in others if name not in listed]
    return found + (gaps(digests) if artifact else [])


def sign(folder: Path) -> None:
    """Write the manifest of all files in ``folder``."""
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it is a link, too large, or not JSON.
    """
    try:
        return json.loads(_read(path, MOST_DEEP).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable: {error}") from error


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, with the keys that stand twice."""


def _regular(path: Path) -> str | None:
    """Why ``path`` is no file to read, in words."""
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        return "is missing"
    if stat.S_ISLNK(mode):
        return "is a symbolic link; put the file itself there"
    return None if stat.S_ISREG(mode) else "is not a file"


def _differs(path: Path, digest: str) -> str | None:
    if why := _regular(path):
        return f"{path.name} {why}"
    try:
        return None if sha256(path) == digest else f"{path.name} does not match its digest"
    except OSError as error:
        return f"{path.name} is not readable: {error.strerror}"


def _read(path: Path, most: int) -> bytes:
    if why := _regular(path):
        raise ValueError(f"it {why}")
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(error.strerror) from error
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content
