"""Checkpoint files that survive: whole or absent, checked when read, a few earlier ones beside the last.

Lightning's own writer moves a file from $TMPDIR over the good checkpoint; on a full disk both are lost (measured).
This one writes beside the target, checks what it wrote and renames. A checkpoint holds tensors and primitives only.
"""

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sslmed.config import DataError, DiskError
from sslmed.durable import PARTIAL, write_atomically

STATE = "sslmed"  # our entry in Lightning's checkpoint
START_AGAIN = "delete it to start again"


class Found(NamedTuple):
    """A checkpoint to go on from: its file, and the optimizer steps that it holds."""

    path: Path
    step: int


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Put ``checkpoint`` in the place of ``path``, or leave that as it was.

    Raises:
        DiskError: it could not be written, or reads back otherwise.
    """
    with write_atomically(path) as partial:
        try:
            torch.save(checkpoint, partial)
        except RuntimeError as error:  # torch hides a full disk behind "unexpected pos"
            raise DiskError(f"cannot write {path}: {error}. The earlier checkpoint is untouched.") from error
        if not _whole(partial):
            raise DiskError(f"{path} reads back differently from what was written; the earlier one is untouched")


def keep(path: Path, step: int, count: int) -> None:
    """Let the checkpoint at ``path``, which holds ``step``, live on beside the next one; of such keep ``count``.

    Its second name is a link, so that it costs no writing and ``path`` never disappears.
    """
    if count and path.exists():
        second = path.with_name(f"step-{step:08}.ckpt")
        second.unlink(missing_ok=True)
        try:
            os.link(path, second)
        except OSError:  # a file system without links: the last one alone is kept
            return
    for old in _earlier(path)[count:]:
        old.unlink()


def load(path: Path) -> dict[str, Any]:
    """The checkpoint dictionary, on the CPU, after every member's checksum has been read.

    Raises:
        DataError: the file is damaged or not a checkpoint of sslmed.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if _whole(path) else None
    except Exception as error:  # a file that is no checkpoint may make torch raise anything
        raise DataError(f"the checkpoint {path} cannot be read ({type(error).__name__}); {START_AGAIN}") from error
    if checkpoint is None:
        raise DataError(f"the checkpoint {path} is damaged; {START_AGAIN}")
    if not isinstance(checkpoint, dict) or STATE not in checkpoint:
        raise DataError(f"{path} was not written by sslmed")
    return checkpoint


def newest(path: Path, say: Callable[[str], None], every: int = 1) -> Found | None:
    """The newest checkpoint that can be read, of ``path`` and those kept beside it; None where there is none.

    Sweeps what a killed writer left behind.

    Args:
        say: is told of each that is damaged.
        every: those of other steps than its multiples, which a signal has left, are passed over if there are others.

    Raises:
        DataError: all are damaged.
    """
    for orphan in path.parent.glob(f".*{PARTIAL}"):
        orphan.unlink()
    damaged: dict[Path, DataError] = {}
    whole: list[Found] = []
    for candidate in [*([path] if path.exists() else []), *_earlier(path)]:
        try:
            whole.append(Found(candidate, int(load(candidate)[STATE]["step"])))
        except DataError as error:
            damaged[candidate] = error
            continue
        if whole[-1].step % every == 0:
            break
    if damaged and not whole:
        raise next(iter(damaged.values()))
    if not whole:
        return None
    found = whole[-1] if whole[-1].step % every == 0 else whole[0]
    for bad, why in damaged.items():
        say(f"warning: {str(why).partition(';')[0]}; going on from {found.path.name}, step {found.step}")
        bad.rename(bad.with_name(f"{bad.name}.damaged"))  # or it would count as one of those kept
    return found


def _earlier(path: Path) -> list[Path]:
    """Those kept beside ``path``, the newest first."""
    return sorted(path.parent.glob("step-*.ckpt"), reverse=True)


def _whole(path: Path) -> bool:
    """Whether every member of the archive has the content that its checksum is of.

    No checksum covers the attributes; a member that a flipped bit makes a folder would be read as uninitialised memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and not any(member.external_attr for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, struct.error):
        return False
