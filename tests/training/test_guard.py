"""Numbers that are not finite: what a skipped step leaves as it was, what going back brings back, and when it stops.

The reference is a plain loop of torch, without Lightning: weights must agree with it to the last bit.
"""

import copy
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import stores
import torch

from sslmed.commands.pretrain import pretrain
from sslmed.config import Interrupted, TrainingAborted
from sslmed.data.loading import Collate
from sslmed.data.modality import named
from sslmed.data.shards.tables import NewScan
from sslmed.data.store import Store
from sslmed.methods.simclr import SimCLR
from sslmed.optim import OptimConfig, decay_groups, scheduled, warmup_cosine
from sslmed.run import Run, read, read_metrics
from sslmed.training.averaging import WeightAverage
from sslmed.training.checkpoint import Checkpointer
from sslmed.training.checkpoint_files import Found, load, newest
from sslmed.training.fit import fit
from sslmed.training.guard import Guard
from sslmed.training.signals import SignalWatch

NAN, INF = float("nan"), float("inf")
EVERY = 2
OPTIMIZERS = ("adamw", "sgd", "lars")


def nan_loss(loss: torch.Tensor) -> torch.Tensor:
    return loss * NAN


def inf_loss(loss: torch.Tensor) -> torch.Tensor:
    return loss + INF


def inf_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself is finite."""
    loss.register_hook(lambda gradient: gradient * INF)
    return loss


def nan_input(batch: torch.Tensor) -> torch.Tensor:
    return batch * NAN


Poison = Callable[[torch.Tensor], torch.Tensor]


class Net(pl.LightningModule):
    """BatchNorm, dropout and a schedule: all that a skipped step could leave a trace in. Batches count from 1."""

    def __init__(
        self, bad: dict[int, Poison] | None = None, name: str = "adamw", steps: int = 12, dies_at: int = 0
    ) -> None:
        super().__init__()
        self.bad, self.dies_at, self.steps = bad or {}, dies_at, steps
        self.config = OptimConfig(name=name, lr=0.05, warmup=0.25, weight_decay=0.01)
        self.norm, self.layer = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3)
        self.monitored: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.25, -2.0]]))
            self.layer.bias.fill_(0.5)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx + 1 == self.dies_at:
            raise Killed
        poison = self.bad.get(batch_idx + 1, lambda loss: loss)
        loss = self.loss(poison(batch) if poison is nan_input else batch)
        loss = loss if poison is nan_input else poison(loss)
        self.monitored = {"loss": loss.detach()}
        return loss

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        features = torch.nn.functional.dropout(self.norm(batch) + 0.5 * batch, 0.2)
        return (self.layer(features) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return scheduled(self.config, decay_groups([self], self.config.weight_decay), 256, self.steps)


class Killed(Exception):
    pass


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    held = optimizer.state_dict()["state"]
    return {
        f"{number} {name}": torch.as_tensor(value).clone() for number, of in held.items() for name, value in of.items()
    }


class Record(pl.Callback):
    """After each optimizer step: weights with statistics, moments, rate. The last checkpoint must be finite."""

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.moments: dict[int, dict[str, torch.Tensor]] = {}
        self.lr: dict[int, float] = {}
        self.norms: dict[int, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.take(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.take(trainer, pl_module)
            self.norms[trainer.global_step] = float(pl_module.monitored["gradient_norm"])
            if self.checkpoint is not None and self.checkpoint.exists():
                assert all(torch.isfinite(tensor).all() for tensor in load(self.checkpoint)["state_dict"].values())

    def take(self, trainer: Any, module: Any) -> None:
        step = trainer.global_step
        self.weights[step], self.moments[step] = state(module), moments(trainer.optimizers[0])
        self.lr[step] = trainer.optimizers[0].param_groups[0]["lr"]


@dataclass
class Guarded:
    """Trains in one run folder, as `fit` does."""

    training: Any
    run: Run

    def __call__(
        self,
        module: Net,
        *more: pl.Callback,
        skip: int = 2,
        rollbacks: int = 1,
        accumulate: int = 1,
        every: int = EVERY,
    ) -> tuple[Guard, Record]:
        guard = Guard(skip, rollbacks, every, self.run)
        keeper, record = Checkpointer(self.run.checkpoint, every, SignalWatch()), Record(self.run.checkpoint)
        found = newest(self.run.checkpoint, self.run.say)
        keeper.found = found and Found(found.path, found.step)
        callbacks = [guard, *more, keeper, record]
        resume = found.path if found else None
        self.training(module, callbacks, steps=module.steps, accumulate=accumulate, resume=resume)
        return guard, record

    @property
    def warnings(self) -> list[str]:
        log = self.run.path / "train.log"
        return [line.partition(" ")[2] for line in log.read_text().splitlines()] if log.exists() else []

    def debug(self, step: int) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.run.path / "debug" / f"step-{step:08}.pt", weights_only=True)
        return found


@pytest.fixture
def guarded(training: Any, tmp_path: Path) -> Any:
    with closing(Run.start(tmp_path / "run", "pretrain", "", {})) as run:
        yield Guarded(training, run)


@pytest.fixture
def another(training: Any, tmp_path: Path) -> Any:
    with closing(Run.start(tmp_path / "another", "pretrain", "", {})) as run:
        yield Guarded(training, run)


def by_hand(
    module: Net, skipped: Sequence[int] = (), back: dict[int, int] | None = None, accumulate: int = 1
) -> tuple[dict[int, dict[str, torch.Tensor]], dict[int, dict[str, torch.Tensor]], dict[int, float]]:
    """The same training as a plain loop: no update in ``skipped`` steps; after step k of ``back`` the state of another.

    Weights with statistics, moments and learning rate after each step.
    """
    torch.manual_seed(7)
    optimizer = module.configure_optimizers()["optimizer"]
    factor = warmup_cosine(module.config, module.steps)
    weights, held, rates = {0: state(module)}, {0: moments(optimizer)}, {}
    whole = {}
    for step in range(1, module.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * factor(step - 1)
        optimizer.zero_grad()
        for part in range((step - 1) * accumulate, step * accumulate):
            batch = torch.randn(4, 2, generator=torch.Generator().manual_seed(part))
            (module.loss(batch) / accumulate).backward()
        if step in skipped:
            module.load_state_dict(weights[step - 1])
        else:
            optimizer.step()
        if back and step in back:
            module.load_state_dict(weights[back[step]])
            optimizer.load_state_dict(copy.deepcopy(whole[back[step]]))
        weights[step], held[step], rates[step] = state(module), moments(optimizer), 0.05 * factor(step)
        whole[step] = copy.deepcopy(optimizer.state_dict())
    return weights, held, rates


# A step is skipped.


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("poison", [nan_loss, inf_loss, inf_gradient, nan_input])
def test_a_skipped_step_changes_nothing_and_counts(poison: Poison, name: str, guarded: Any) -> None:
    guard, record = guarded(Net({5: poison}, name))
    assert same(record.weights[5], record.weights[4]), "nor the statistics of BatchNorm"
    assert same(record.moments[5], record.moments[4])
    weights, held, rates = by_hand(Net(name=name), skipped=[5])
    assert list(record.weights) == list(range(13)), "steps count on"
    assert all(record.lr[step] == pytest.approx(rates[step], abs=1e-15) for step in rates), "so does the schedule"
    assert all(same(record.weights[step], weights[step]) for step in weights), "and the stream"
    assert all(same(record.moments[step], held[step]) for step in held)
    assert (guard.skipped, guard.in_a_row, guard.rolled_back) == (1, 0, 0)
    assert guarded.warnings == [
        "warning: loss or gradient of step 5 is not finite (its images: debug/step-00000005.pt); the step is skipped"
    ]


def test_the_first_step_may_be_skipped(guarded: Any) -> None:
    """There is no moment yet, and nothing must make one."""
    _, record = guarded(Net({1: nan_loss}))
    assert record.moments[1] == {}
    assert same(record.weights[12], by_hand(Net(), skipped=[1])[0][12])


@pytest.mark.parametrize("part", [9, 10])
def test_one_part_of_an_accumulated_step_spoils_it_whole(part: int, guarded: Any) -> None:
    _, record = guarded(Net({part: nan_input}), accumulate=2)
    assert same(record.weights[5], record.weights[4])
    assert same(record.weights[12], by_hand(Net(), skipped=[5], accumulate=2)[0][12])
    losses = guarded.debug(5)["loss"]
    assert [loss == loss for loss in losses] == [part != 9, part != 10]
    assert guarded.debug(5)["ids"][0].dtype is torch.int64
    assert len(guarded.debug(5)["ids"]) == 2


def test_the_norm_of_the_gradient_is_left_for_the_monitor(guarded: Any) -> None:
    _, record = guarded(Net({3: inf_gradient}))
    module = Net()
    module.load_state_dict(record.weights[0])
    torch.manual_seed(7)
    module.loss(torch.randn(4, 2, generator=torch.Generator().manual_seed(0))).backward()
    expected = sum(
        float(parameter.grad.square().sum()) for parameter in module.parameters() if parameter.grad is not None
    )
    assert record.norms[1] == pytest.approx(expected**0.5, rel=1e-6)
    assert not torch.isfinite(torch.tensor(record.norms[3]))


# The weights go back.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_too_many_in_a_row_go_back_to_the_last_checkpoint(name: str, guarded: Any) -> None:
    guard, record = guarded(Net(dict.fromkeys((6, 7, 8), nan_loss), name))
    assert same(record.weights[7], record.weights[5])
    assert not same(record.weights[7], record.weights[4])
    assert same(record.weights[8], record.weights[4]), "step 6 was skipped, and so not saved"
    assert same(record.moments[8], record.moments[4])
    weights, held, rates = by_hand(Net(name=name), skipped=(6, 7, 8), back={8: 4})
    assert all(record.lr[step] == pytest.approx(rates[step], abs=1e-15) for step in rates), "not that of step 4"
    assert all(same(record.weights[step], weights[step]) for step in weights)
    assert all(same(record.moments[step], held[step]) for step in held)
    assert (guard.skipped, guard.in_a_row, guard.rolled_back) == (3, 0, 1)
    assert guarded.warnings[2] == (
        "warning: loss or gradient of step 8 is not finite (its images: debug/step-00000008.pt); "
        "the weights go back to step 4, and training goes on with other images"
    )


def test_the_second_time_it_stops(guarded: Any) -> None:
    bad = dict.fromkeys((5, 6, 7, 9, 10, 11), nan_loss)
    with pytest.raises(
        TrainingAborted, match=r"step 11 is not .*step-00000011.pt.*after 5 others, 2 in a row.*from before.*optim\.lr"
    ) as caught:
        guarded(Net(bad))
    assert caught.value.exit_code == 3
    assert load(guarded.run.checkpoint)["sslmed"]["step"] == 8
    assert len(list((guarded.run.path / "debug").iterdir())) == 6


@pytest.mark.parametrize(("skip", "rollbacks", "stops_at"), [(0, 0, 5), (0, 1, 6), (3, 0, 8), (1, 2, 10)])
def test_how_often_is_a_setting(skip: int, rollbacks: int, stops_at: int, guarded: Any) -> None:
    with pytest.raises(TrainingAborted, match=f"gradient of step {stops_at} is not finite"):
        guarded(Net(dict.fromkeys(range(5, 13), nan_loss)), skip=skip, rollbacks=rollbacks)
    assert load(guarded.run.checkpoint)["sslmed"]["step"] == 4


def test_with_no_checkpoint_yet_there_is_nowhere_to_go_back_to(guarded: Any) -> None:
    with pytest.raises(
        TrainingAborted, match=r"step 3 is not finite.*in a row; there is no checkpoint yet\. Look"
    ) as caught:
        guarded(Net(dict.fromkeys((1, 2, 3), nan_loss)))
    assert caught.value.exit_code == 3
    assert not guarded.run.checkpoint.exists()


def test_a_moving_average_leaves_skipped_steps_out_and_goes_back_too(guarded: Any) -> None:
    average = WeightAverage(0.5)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Averages(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            kept[trainer.global_step] = {name: tensor.clone() for name, tensor in average.average.items()}

    guarded(Net(dict.fromkeys((6, 7, 8), nan_input)), average, Averages())
    assert not same(kept[5], kept[4])
    assert same(kept[6], kept[5])
    assert same(kept[7], kept[5])
    assert same(kept[8], kept[4])
    assert not same(kept[9], kept[8])


# The end of training.


def test_an_isolated_bad_last_step_is_skipped_and_saved(guarded: Any) -> None:
    _, record = guarded(Net({6: nan_loss}, steps=6))
    saved = load(guarded.run.checkpoint)
    assert saved["sslmed"]["step"] == 6
    assert same(saved["state_dict"], record.weights[5])


def test_bad_last_steps_stop_whatever_may_be_skipped(guarded: Any) -> None:
    """Nothing would show any more whether it has got better."""
    with pytest.raises(TrainingAborted, match="step 6 is not finite"):
        guarded(Net(dict.fromkeys((5, 6), nan_loss), steps=6), skip=100, rollbacks=100)
    assert load(guarded.run.checkpoint)["sslmed"]["step"] == 4


# What is written down.


@pytest.mark.parametrize("resumed", [False, True])
def test_a_step_can_be_seen_again_from_what_is_written_down(resumed: bool, guarded: Any) -> None:
    """Dropout draws the same with the random state that was written; in the first step after a resume as well."""
    if resumed:
        with pytest.raises(Killed):
            guarded(Net({5: inf_gradient}, dies_at=5))
    _, record = guarded(Net({5: inf_gradient}))
    found = guarded.debug(5)
    assert found["step"] == 5
    assert found["gradients_not_finite"] == ["norm.weight", "norm.bias", "layer.weight", "layer.bias"]
    assert found["gradient_norm"] == pytest.approx(NAN, nan_ok=True) or found["gradient_norm"] == INF
    module = Net()
    module.load_state_dict(record.weights[4])
    torch.set_rng_state(found["rng"])
    loss = module.loss(torch.randn(4, 2, generator=torch.Generator().manual_seed(4)))
    assert [loss.item()] == found["loss"]


# Interrupted and resumed.

HISTORY = dict.fromkeys((3, 6, 7, 8, 11), nan_input)  # skipped; back to 4; skipped


@pytest.fixture
def uninterrupted(another: Any) -> tuple[Guard, dict[str, torch.Tensor]]:
    guard, record = another(Net(HISTORY, steps=14))
    return guard, record.weights[14]


@pytest.mark.parametrize("kill", [4, 6, 7, 8, 9, 10, 11, 12])
def test_killed_and_resumed_it_ends_the_same(kill: int, uninterrupted: Any, guarded: Any) -> None:
    with pytest.raises(Killed):
        guarded(Net(HISTORY, steps=14, dies_at=kill))
    guard, record = guarded(Net(HISTORY, steps=14))
    assert same(record.weights[14], uninterrupted[1])
    assert guard.state_dict() == uninterrupted[0].state_dict() == {"in_a_row": 0, "skipped": 5, "rolled_back": 1}


class Impatient(pl.Callback):
    """Asks for the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("at", [5, 6, 8, 9])
def test_stopped_by_a_signal_and_resumed_it_ends_the_same(at: int, uninterrupted: Any, guarded: Any) -> None:
    """What a signal has saved at step 5 is no place to go back to: an uninterrupted training has nothing there."""
    kept = "is saved" if at in (5, 9) else "is from before a bad step"
    with pytest.raises(Interrupted, match=f"after step {at}; the checkpoint {kept}"):
        guarded(Net(HISTORY, steps=14), Impatient(at))
    assert load(guarded.run.checkpoint)["sslmed"]["step"] == (at if at in (5, 9) else 4)
    guard, record = guarded(Net(HISTORY, steps=14))
    assert same(record.weights[14], uninterrupted[1])
    assert guard.state_dict() == uninterrupted[0].state_dict()


def test_two_signals_between_regular_checkpoints_do_not_push_the_regular_one_out(guarded: Any, another: Any) -> None:
    bad = dict.fromkeys((7, 8), nan_loss)
    for at in (5, 6):
        with pytest.raises(Interrupted):
            guarded(Net(bad), Impatient(at), skip=1, every=4)
    _, record = guarded(Net(bad), skip=1, every=4)
    _, whole = another(Net(bad), skip=1, every=4)
    assert same(record.weights[12], whole.weights[12])


# Through a whole pretraining.

RECIPE = "xray/simclr_resnet18"
SMALL = (
    *("backbone.name=test_resnet", "backbone.drop_path=0.1", "method.hidden=64", "data.size=32", "data.workers=0"),
    *("train.max_steps=9", "train.batch_size=16", "train.precision=32", "train.save_every_steps=2"),
    *("monitor.log_every=1", "monitor.knn_every=0"),
)


def test_one_bad_step_of_many_is_told_and_can_be_seen_again(
    phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 7 is the second of the second epoch. What was written down finds its images, views and drop paths again."""
    loss, calls, after = SimCLR.loss, iter(range(1, 100)), []

    def sometimes_bad(method: SimCLR, batch: Any) -> dict[str, torch.Tensor]:
        outputs = loss(method, batch)
        return outputs | {"loss": inf_gradient(outputs["loss"])} if next(calls) == 7 else outputs

    fitted: list[Any] = []

    def noted(module: SimCLR, dataset: Any, *rest: Any, **named: Any) -> Any:
        fitted.extend((module, dataset))
        return fit(module, dataset, *rest, **named)

    monkeypatch.setattr("sslmed.commands.pretrain.fit", noted)
    monkeypatch.setattr(SimCLR, "loss", sometimes_bad)
    monkeypatch.setattr(SimCLR, "after_step", lambda _, progress: after.append(progress.step))
    run, keep = tmp_path / "run", "train.keep_checkpoints=9"
    overrides = (*SMALL, keep, "train.save_every_steps=1", "train.batch_size=15")
    assert pretrain(RECIPE, phantom_store.path, run, overrides=overrides).steps == 9
    assert (read(run)["status"], read(run)["exit_code"]) == ("done", 0)
    assert after == [1, 2, 3, 4, 5, 6, 8, 9], "momentum networks and queues stay as they are"
    assert [line["step"] for line in read_metrics(run)] == after
    assert (
        "step 7 is not finite (its images: debug/step-00000007.pt); the step is skipped"
        in (run / "train.log").read_text()
    )
    found = torch.load(run / "debug" / "step-00000007.pt", weights_only=True)
    assert (found["step"], found["seed"], found["epoch"], [len(ids) for ids in found["ids"]]) == (7, 0, 1, [15])

    method, dataset = fitted
    method.load_state_dict(load(run / "checkpoints" / "step-00000006.ckpt")["state_dict"])
    method.train()
    batch = Collate(found["seed"])([dataset[found["epoch"], row] for row in found["ids"][0].tolist()])
    torch.set_rng_state(found["rng"])
    assert [loss(method, batch)["loss"].item()] == found["loss"]


def constant(path: Path, value: float, kind: type = np.uint8) -> Store:
    pixels = np.full((40, 40), value, kind)
    scans = [NewScan(pixels, named("xray").intensity(pixels), f"{number:064x}") for number in range(16)]
    return stores.write_store(path, scans, [f"{number:032x}" for number in range(16)])


def test_images_of_huge_numbers_make_none_that_is_none(tmp_path: Path) -> None:
    store = constant(tmp_path / "store", 1e30, np.float32)
    pretrain(RECIPE, store.path, tmp_path / "run", overrides=SMALL)
    values = [value for line in read_metrics(tmp_path / "run") for value in line.values()]
    assert np.isfinite(values).all()
    saved = load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize("value", [0, 7])
def test_blank_images_end_the_run_and_make_no_number_that_is_none(value: float, tmp_path: Path) -> None:
    store = constant(tmp_path / "store", value, np.float32)
    with pytest.raises(TrainingAborted, match=r"blank: since step 1 .*sslmed preview") as caught:
        pretrain(RECIPE, store.path, tmp_path / "run", overrides=(*SMALL, "train.save_every_steps=1"))
    assert caught.value.exit_code == 3
    values = [value for line in read_metrics(tmp_path / "run") for value in line.values()]
    assert np.isfinite(values).all()
    (debug,) = (tmp_path / "run" / "debug").iterdir()
    found = torch.load(debug, weights_only=True)
    assert sorted(found["ids"][0].tolist()) == list(range(16))
    assert "blank" in found["reason"]
    saved = load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


@pytest.mark.parametrize("value", [NAN, INF])
def test_images_that_hold_no_numbers_end_the_run(value: float, tmp_path: Path) -> None:
    store = constant(tmp_path / "store", value, np.float32)
    with pytest.raises(TrainingAborted, match=r"step 4 is not finite \(its images: debug/step-00000004.pt") as caught:
        pretrain(RECIPE, store.path, tmp_path / "run", overrides=SMALL)
    assert caught.value.exit_code == 3
    assert read(tmp_path / "run")["exit_code"] == 3
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    found = torch.load(tmp_path / "run" / "debug" / "step-00000004.pt", weights_only=True)
    assert sorted(found["ids"][0].tolist()) == list(range(16))
