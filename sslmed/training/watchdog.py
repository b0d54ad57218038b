"""Says where a training hangs: every thread's stack, in a file, when a step takes far too long."""

import contextlib
import faulthandler
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl

from sslmed import distributed
from sslmed.run import Run


class Watchdog(pl.Callback):
    """Writes ``debug/hang-rank-0.txt`` when nothing has ended for ``seconds``; training goes on if it can.

    A collective that waits in vain gives up somewhat later, by its own timeout.
    """

    def __init__(self, run: Run, seconds: float) -> None:
        self.path: Path = run.path / "debug" / f"hang-rank-{distributed.rank()}.txt"
        self.seconds = seconds
        self._file: TextIO | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path.parent.mkdir(exist_ok=True)
        self._file = self.path.open("w")
        self._again()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._again()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._again()

    def close(self) -> None:
        """Stop watching, and leave no file where nothing hung."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
            if not self.path.stat().st_size:
                self.path.unlink()
                with contextlib.suppress(OSError):  # what else is there stays
                    self.path.parent.rmdir()

    def _again(self) -> None:
        if self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)
