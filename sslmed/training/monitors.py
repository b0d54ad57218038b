"""What is watched while training: loss, embeddings, speed, and a nearest-neighbour probe. Alarms say what they saw."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pydantic import Field

from sslmed.config import Config, TrainingAborted
from sslmed.run import Run

RANKME_ROWS = 1024


class MonitorConfig(Config):
    """What is measured, how often, and what an alarm does.

    Attributes:
        log_every: optimizer steps between lines of metrics.jsonl.
        knn_every: epochs between nearest-neighbour probes on val patients, when labels exist; 0 is never.
        collapse: what happens when embeddings have collapsed: ``stop`` (exit 3), ``warn`` or ``off``.
        collapse_steps: for how many steps in a row they must look collapsed.
    """

    log_every: Annotated[int, Field(ge=1)] = 10
    knn_every: Annotated[int, Field(ge=0)] = 5
    collapse: Literal["stop", "warn", "off"] = "stop"
    collapse_steps: Annotated[int, Field(ge=1)] = 200


class Monitor(pl.Callback):
    """Logs every ``log_every`` steps and raises the alarms.

    Args:
        images: images an optimizer step.
        epoch_steps: optimizer steps an epoch.
        probe: returns scores by name; called every ``knn_every`` epochs and at the end.
    """

    def __init__(
        self,
        config: MonitorConfig,
        run: Run,
        images: int,
        epoch_steps: int,
        probe: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.config, self.run, self.images, self.epoch_steps, self.probe = config, run, images, epoch_steps, probe
        self._loss = torch.zeros(())
        self._recent: deque[torch.Tensor] = deque()
        self._collapsed_since: int | None = None
        self._speed = _Speed()
        self._lr = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._speed.restart(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # afterwards it is the next step's

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._loss = pl_module.monitored["loss"]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._remember(pl_module.monitored.get("embeddings"))
        step, total = trainer.global_step, int(trainer.max_steps)
        if step % self.config.log_every == 0 or step == total:
            self._log(step, total, pl_module.monitored)
        if (
            self.probe
            and self.config.knn_every
            and (step % (self.config.knn_every * self.epoch_steps) == 0 or step == total)
        ):
            self._run_probe(step, self.probe)

    def state_dict(self) -> dict[str, Any]:
        return {"collapsed_since": self._collapsed_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._collapsed_since = state["collapsed_since"]  # or a run that is preempted often would never raise the alarm

    def check_finite(self) -> None:
        """Raise when the last loss is not a number.

        Raises:
            TrainingAborted: it is not; the last checkpoint is from before.
        """
        if not bool(torch.isfinite(self._loss)):
            raise TrainingAborted(
                f"the loss became {float(self._loss)}; the last checkpoint is from before that. "
                "Lower optim.lr or lengthen optim.warmup, then start a new run."
            )

    def _log(self, step: int, total: int, outputs: dict[str, torch.Tensor]) -> None:
        self.check_finite()
        scalars = {name: float(value) for name, value in outputs.items() if value.ndim == 0}
        rate, left = self._speed.measure(step, total)
        health = self._health()
        self.run.log(
            step,
            epoch=step / self.epoch_steps,
            lr=self._lr,
            images_per_second=rate * self.images,
            seconds_left=left,
            **scalars,
            **health,
        )
        if self._speed.due(step == total):
            parts = [f"step {step}/{total}", f"epoch {step / self.epoch_steps:.1f}", f"loss {scalars['loss']:.4f}"]
            parts += [f"{name} {value:.3g}" for name, value in health.items()]
            self.run.say("  ".join([*parts, f"{rate * self.images:.0f} images/s", f"{_clock(left)} left"]))
        if "embedding_std" in health:
            self._watch_collapse(step, health["embedding_std"], outputs["embeddings"].shape[1])

    def _remember(self, embeddings: torch.Tensor | None) -> None:
        if embeddings is None:
            return
        self._recent.append(embeddings.float())
        while sum(map(len, self._recent)) - len(self._recent[0]) >= RANKME_ROWS:
            self._recent.popleft()

    def _health(self) -> dict[str, float]:
        if not self._recent:
            return {}
        return {"embedding_std": embedding_std(self._recent[-1]), "rankme": rankme(torch.cat(list(self._recent)))}

    def _watch_collapse(self, step: int, std: float, width: int) -> None:
        healthy = 1 / math.sqrt(width)
        if self.config.collapse == "off" or std >= 0.1 * healthy:
            self._collapsed_since = None
            return
        if self._collapsed_since is None:
            self._collapsed_since = step
        if step - self._collapsed_since < self.config.collapse_steps:
            return
        message = (
            f"the embeddings have collapsed: their standard deviation is {std:.2g} since step {self._collapsed_since}, "
            f"where {healthy:.2g} is healthy. All images look alike to the network: lower optim.lr, "
            "lengthen optim.warmup, raise train.batch_size, or strengthen the views."
        )
        if self.config.collapse == "stop":
            raise TrainingAborted(message + " (monitor.collapse=warn goes on.)")
        self.run.say(f"warning: {message}")
        self._collapsed_since = step

    def _run_probe(self, step: int, probe: Callable[[], dict[str, float]]) -> None:
        scores = probe()
        self.run.log(step, epoch=step / self.epoch_steps, **scores)
        self.run.say(f"step {step}  " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        self._speed.restart(step)  # the probe's time is not training time


def embedding_std(embeddings: torch.Tensor) -> float:
    """Mean over dimensions of the standard deviation of the normalised embeddings (N, D).

    1 / sqrt(D) when they spread evenly over the sphere, 0 when collapsed (SimSiam, arXiv 2011.10566, section 4.1).
    """
    return float(F.normalize(embeddings.detach().float(), dim=1).std(dim=0).mean()) if len(embeddings) > 1 else 0.0


def rankme(embeddings: torch.Tensor) -> float:
    """The effective rank of embeddings (N, D), from 1 (collapsed) to min(N, D): RankMe, arXiv 2210.02885, equation 1.

    The exponential of the entropy of the singular values' shares. A larger epsilon than the paper's 1e-7 would make a
    collapsed matrix look richer.
    """
    values = torch.linalg.svdvals(embeddings.detach().float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


class _Speed:
    """Steps a second since the last restart, and when a line is due: at most one in ten seconds."""

    def restart(self, step: int) -> None:
        self.since = self.spoke = time.monotonic()
        self.first = step

    def measure(self, step: int, total: int) -> tuple[float, float]:
        rate = (step - self.first) / max(time.monotonic() - self.since, 1e-9)
        return rate, (total - step) / max(rate, 1e-9)

    def due(self, last: bool) -> bool:
        now = time.monotonic()
        if now - self.spoke < 10 and not last:
            return False
        self.spoke = now
        return True


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
