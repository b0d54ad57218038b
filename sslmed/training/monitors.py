"""What is watched while training: loss, embeddings, norms, speed, and a nearest-neighbour probe."""

import time
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pydantic import Field

from sslmed import distributed
from sslmed.config import Config
from sslmed.run import Run
from sslmed.training.alarms import Action, Alarms
from sslmed.training.signals import SignalWatch
from sslmed.training.wait_meter import WaitMeter

RANKME_ROWS = 1024


class MonitorConfig(Config):
    """What is measured, how often, and what an alarm does.

    Attributes:
        log_every: optimizer steps between lines of metrics.jsonl.
        knn_every: epochs between nearest-neighbour probes on val patients, when labels exist; 0 is never.
        pictures_every: epochs between pictures of what the network makes of images, for methods that draw some; 0 is
            at the end alone.
        collapse: what happens when embeddings have collapsed: ``stop`` (exit 3), ``warn`` or ``off``.
        collapse_steps: for how many steps in a row embeddings must look collapsed, or a momentum network frozen.
        explosion: what happens when the norm of the gradient or of the embeddings is 100 times what it was.
        frozen: what happens when a momentum network no longer follows.
    """

    log_every: Annotated[int, Field(ge=1)] = 10
    knn_every: Annotated[int, Field(ge=0)] = 5
    pictures_every: Annotated[int, Field(ge=0)] = 10
    collapse: Action = "stop"
    collapse_steps: Annotated[int, Field(ge=1)] = 200
    explosion: Action = "warn"
    frozen: Action = "stop"


class Monitor(pl.Callback):
    """Logs every ``log_every`` steps and raises the alarms. Of several processes it logs the mean.

    Args:
        images: images an optimizer step.
        epoch_steps: optimizer steps an epoch.
        probe: returns scores by name; called on the first process, every ``knn_every`` epochs and at the end.
        signals: may cut a probe short, which then comes first after a resume.
        meter: of the time that steps wait for data.
    """

    def __init__(
        self,
        config: MonitorConfig,
        run: Run,
        images: int,
        epoch_steps: int,
        probe: Callable[[], dict[str, float]] | None = None,
        signals: SignalWatch | None = None,
        meter: WaitMeter | None = None,
    ) -> None:
        self.config, self.run, self.images, self.epoch_steps, self.probe = config, run, images, epoch_steps, probe
        self.signals, self.meter = signals or SignalWatch(), meter
        self._recent: deque[torch.Tensor] = deque()
        actions: dict[str, Action] = {name: getattr(config, name) for name in ("collapse", "explosion", "frozen")}
        self._alarms = Alarms(actions, config.collapse_steps, config.log_every, run.say)
        self._speed = _Speed()
        self._lr = 0.0
        self._owed: int | None = None  # the step of a probe that a signal has cut short

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._speed.restart(trainer.global_step)
        self._make_up()

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
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, total = trainer.global_step, int(trainer.max_steps)
        if not getattr(pl_module, "skipped", False):
            self._remember(pl_module.monitored.get("embeddings"))
            if self._due(step, total):
                self._log(step, total, pl_module.monitored, _contrast(batch))
                averaged = getattr(pl_module, "averaged", None)
                if averaged is not None:
                    self._alarms.look_at_average(step, total, averaged[1])
        if self.config.knn_every and (step % (self.config.knn_every * self.epoch_steps) == 0 or step == total):
            self._run_probe(step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make_up()

    def state_dict(self) -> dict[str, Any]:
        return {**self._alarms.state_dict(), "owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._alarms.load_state_dict(state)
        self._owed = state.get("owed")

    def _due(self, step: int, total: int) -> bool:
        return step % self.config.log_every == 0 or step == total

    def _log(self, step: int, total: int, outputs: dict[str, torch.Tensor], contrast: dict[str, float]) -> None:
        scalars = {name: float(value) for name, value in outputs.items() if value.ndim == 0}
        health = self._health()
        means = distributed.means({**scalars, **contrast, **health, **self._embedding_norm()})
        rate, left = self._speed.measure(step, total)
        waiting = self.meter.take() if self.meter else None
        self.run.log(
            step,
            epoch=step / self.epoch_steps,
            lr=self._lr,
            images_per_second=rate * self.images,
            seconds_left=left,
            **({} if waiting is None else {"data_wait": waiting}),
            **means,
        )
        if self._speed.due(step == total):
            parts = [f"step {step}/{total}", f"epoch {step / self.epoch_steps:.1f}", f"loss {means['loss']:.4f}"]
            parts += [f"{name} {means[name]:.3g}" for name in health]
            self.run.say("  ".join([*parts, f"{rate * self.images:.0f} images/s", f"{_clock(left)} left"]))
        if "view_std" in means:
            self._alarms.look_at_views(step, means["view_std"])
        if "embedding_std" in means:
            self._alarms.look_at_embeddings(step, means["embedding_std"], outputs["embeddings"].shape[1])
        for name in ("gradient_norm", "embedding_norm"):
            if name in means:
                self._alarms.look_at_norm(step, name, means[name])

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

    def _embedding_norm(self) -> dict[str, float]:
        return {"embedding_norm": float(self._recent[-1].norm(dim=1).mean())} if self._recent else {}

    def _make_up(self) -> None:
        if self._owed is not None:
            self._run_probe(self._owed)

    def _run_probe(self, step: int) -> None:
        probe = self.probe
        if probe is None:
            return
        scores = distributed.first(lambda: self.signals.cut(probe))
        self._owed = step if scores is None else None
        if scores is not None:
            self.run.log(step, epoch=step / self.epoch_steps, **scores)
            self.run.say(f"step {step}  " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        self._speed.restart(step)  # the probe's time is not training time
        if self.meter:
            self.meter.restart()


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


def _contrast(batch: Any) -> dict[str, float]:
    """How much there is to see in the first views: the mean of their standard deviations."""
    views = getattr(batch, "views", None)
    return {"view_std": float(views[0].float().flatten(1).std(dim=1).mean())} if views else {}


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
