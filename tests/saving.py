"""Processes that save checkpoints and are killed, or run out of disk, while they do."""

import contextlib
import itertools
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def save_forever(path: str) -> None:
    """Checkpoints of 2 MB one after the other, each of one step more; two earlier ones are kept."""
    from sslmed.training.checkpoint_files import STATE, keep, newest, write

    target = Path(path)
    found = newest(target, print)
    for step in itertools.count(found.step + 1 if found else 1):
        if step > 1:
            keep(target, step - 1, 2)
        write({STATE: {"step": step}, "state_dict": {"weight": torch.full((500_000,), float(step))}}, target)


def pretrain_on_a_full_disk(store: str, out: str, settings: tuple[str, ...], room: int | None) -> None:
    """Pretrain; after the first checkpoint no file may have more than ``room`` bytes. Ends as the command does."""

    def fill() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    _pretrain(store, out, settings, fill)


def pretrain_until_the_disk_is_full(store: str, out: str, settings: tuple[str, ...], filler: str) -> None:
    """Pretrain; after the first checkpoint a file takes what room there is, but for some log lines."""

    def fill() -> None:
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(filler, Path(filler).stat().st_size - 40_960)

    _pretrain(store, out, settings, fill)


def _pretrain(store: str, out: str, settings: tuple[str, ...], fill: Callable[[], None]) -> None:
    from sslmed.commands.pretrain import pretrain
    from sslmed.config import SslmedError
    from sslmed.training.checkpoint import Checkpointer

    torch.set_num_threads(1)
    save = Checkpointer.save

    def then_fill(self: Checkpointer, trainer: Any) -> None:
        save(self, trainer)
        fill()

    Checkpointer.save = then_fill  # type: ignore[method-assign]
    try:
        pretrain("xray/simclr_resnet18", store, out, overrides=settings, resume=Path(out, "run.json").exists())
    except SslmedError as error:
        raise SystemExit(error.exit_code) from None
