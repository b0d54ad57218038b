"""Artifacts as they are written: whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sslmed.artifact import selftest
from sslmed.artifact.card import Card
from sslmed.artifact.manifest import sign
from sslmed.artifact.page import readme
from sslmed.artifact.selftest import Answers
from sslmed.config import DiskError, OutputExistsError
from sslmed.durable import PARTIAL, sync_folder

DECODER = "decoder.safetensors"


def write(
    folder: Path,
    network: nn.Module,
    card: Card,
    seen: np.ndarray[Any, np.dtype[np.uint8]],
    head: nn.Module | None = None,
    familiarity: dict[str, torch.Tensor] | None = None,
    answers: Answers | None = None,
    decoder: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write an artifact, whole or not at all, in place of an earlier one of the same run.

    Args:
        network: the timm network; its self-test features are computed here.
        seen: what training saw, (n, 8), as ``data.identity.fingerprint`` makes it.
        head: the supervised head.
        familiarity: statistics of the features of what training saw, without a patient's own.
        answers: what the head makes of images; for the self-test.
        decoder: neck and decoder of the pretext task, which the card names too.

    Raises:
        DiskError: disk full, read-only or an I/O error; an earlier artifact is untouched.
    """
    earlier = _earlier(folder)
    if earlier.exists() and not folder.exists():
        earlier.rename(folder)  # a process was killed between the two renames
    for orphan in (earlier, *folder.parent.glob(f".{folder.name}.*{PARTIAL}")):  # of one that was killed while it wrote
        shutil.rmtree(orphan, ignore_errors=True)
    with _partial(folder) as partial:
        _save_tensors(partial / "model.safetensors", _state(network))
        if head is not None:
            _save_tensors(partial / "head.safetensors", _state(head))
        if decoder is not None:
            _save_tensors(partial / DECODER, _contiguous(decoder))
        if familiarity is not None:
            _save_tensors(partial / "familiarity.safetensors", familiarity)
        _save_tensors(partial / "fingerprint.safetensors", {"seen": torch.from_numpy(np.array(seen, dtype=np.uint8))})
        _save_tensors(partial / "selftest.safetensors", selftest.recorded(card, network, answers))
        _finish(partial, card)
        _swap(partial, folder)


@contextmanager
def rewritten(source: Path, folder: Path, card: Card, others: Mapping[str, str]) -> Iterator[Path]:
    """The files of the artifact in ``source`` with another card and the page of it, in place when the block succeeds.

    Args:
        others: more text files, content by name.

    Yields:
        The folder as it will be, for a last check.

    Raises:
        OutputExistsError: there is something at ``folder``.
        DiskError: it cannot be written.
    """
    with made(folder) as partial:
        for path in sorted(source.glob("[!.]*.safetensors")):
            shutil.copyfile(path, partial / path.name)
        for name, content in others.items():
            (partial / name).write_text(content, encoding="utf-8")
        _finish(partial, card)
        yield partial


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to fill, which takes its place when all went well; else nothing is left of it.

    Raises:
        OutputExistsError: there is something at ``folder``.
        DiskError: it cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise OutputExistsError(f"the output {folder} exists already; remove it, or give another one")
    for orphan in folder.parent.glob(f".{folder.name}.*{PARTIAL}"):  # of one that was killed while it wrote
        shutil.rmtree(orphan, ignore_errors=True)
    with _partial(folder) as partial:
        yield partial
        _flush(partial)
        partial.rename(folder)
        sync_folder(folder.parent)


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    absent = [parent for parent in folder.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:  # safetensors has no other word for a full disk
        raise DiskError(f"cannot write {folder}: {error}. What was there before is untouched.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in absent:  # empty ones alone, which they are when nothing was written
            with suppress(OSError):
                parent.rmdir()


def _finish(partial: Path, card: Card) -> None:
    (partial / "card.json").write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(readme(card), encoding="utf-8")
    sign(partial)
    _flush(partial)


def _flush(partial: Path) -> None:
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone, but an artifact is for others
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _earlier(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.earlier")


def _swap(new: Path, folder: Path) -> None:
    earlier = _earlier(folder)
    if folder.exists():
        folder.rename(earlier)
    try:
        new.rename(folder)
    except OSError:
        if earlier.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return _contiguous(module.state_dict())


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses channels_last tensors
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)
