from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sslmed.run import Run, read_metrics
from sslmed.training.averaging import WeightAverage
from sslmed.training.checkpoint import Checkpointer
from sslmed.training.checkpoint_files import load
from sslmed.training.early_stopping import EarlyStopping, StopConfig
from sslmed.training.signals import SignalWatch


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run.start(tmp_path / "run", "finetune", "", {}) as run:
        return run


def stopping(run: Run, scores: Sequence[float], seen: list[int] | None = None, **config: int) -> EarlyStopping:
    """Early stopping whose checks give ``scores`` in turn."""
    coming = iter(scores)
    return EarlyStopping(StopConfig(**({"check_every": 2, "patience": 2} | config)), run, "auroc", lambda: next(coming))


def weights_after(training: Any, steps: int, **how: Any) -> list[float]:
    module = training.Tiny()
    training(module, steps=steps, **how)
    weights: list[float] = module.weights
    return weights


def test_it_stops_after_patience_and_restores_the_best_weights(run: Run, training: Any) -> None:
    module = training.Tiny()
    stop = stopping(run, [0.5, 0.7, 0.6, 0.7])  # the last is as good as the best, which is not better
    training(module, [stop], steps=20)
    assert module.steps == 8
    assert (stop.best, stop.best_step) == (0.7, 4)
    assert module.weights == weights_after(training, 4)
    assert module.weights != weights_after(training, 8)
    checks = [(line["step"], line["val_auroc"]) for line in read_metrics(run.path)]
    assert checks == [(2, 0.5), (4, 0.7), (6, 0.6), (8, 0.7)]


def test_a_better_score_renews_the_patience(run: Run, training: Any) -> None:
    module = training.Tiny()
    training(module, [stopping(run, [0.5, 0.4, 0.6, 0.5, 0.55])], steps=20)
    assert module.steps == 10
    assert module.weights == weights_after(training, 6)


def test_without_patience_it_goes_to_the_end_and_checks_there(run: Run, training: Any) -> None:
    module = training.Tiny()
    stop = stopping(run, [0.9, 0.1, 0.1, 0.1], patience=0)
    training(module, [stop], steps=7)
    assert module.steps == 7
    assert [line["step"] for line in read_metrics(run.path)] == [2, 4, 6, 7]
    assert module.weights == weights_after(training, 2)


def test_the_last_weights_may_be_the_best(run: Run, training: Any) -> None:
    module = training.Tiny()
    training(module, [stopping(run, [0.1, 0.2, 0.3])], steps=5)
    assert module.weights == weights_after(training, 5)


def test_steps_are_the_optimizers(run: Run, training: Any) -> None:
    module = training.Tiny()
    training(module, [stopping(run, [0.5, 0.4, 0.3])], steps=20, accumulate=3)
    assert module.steps == 6 * 3
    assert module.weights == weights_after(training, 2, accumulate=3)


def test_a_copy_is_kept_not_the_living_weights(run: Run, training: Any) -> None:
    module = training.Tiny()
    stop = stopping(run, [0.9, 0.1, 0.1])
    training(module, [stop], steps=20)
    assert torch.equal(stop.weights["layer.weight"], module.layer.weight)
    with torch.no_grad():
        module.layer.weight.zero_()
    assert stop.weights["layer.weight"].abs().sum() > 0


class Killed(Exception):
    pass


def kill(_: Any) -> None:
    raise Killed


# Scores by check; training of 12 steps is checked at 2, 4, ... and saved at 3, 6, ...: killed in each place.
@pytest.mark.parametrize("killed", [4, 5, 7, 8, 9, 11])
@pytest.mark.parametrize("scores", [[0.5, 0.7, 0.6, 0.8, 0.1, 0.2], [0.9, 0.1, 0.2, 0.3, 0.95, 0.1]])
def test_killed_and_resumed_it_ends_with_the_same_weights(
    killed: int, scores: list[float], run: Run, training: Any, tmp_path: Path
) -> None:
    def keeper(name: str) -> Checkpointer:
        return Checkpointer(tmp_path / f"{name}.ckpt", 3, SignalWatch())

    def score_at(module: Any, start: int) -> Callable[[], float]:
        return lambda: scores[(start + module.steps) // 2 - 1]

    config = StopConfig(check_every=2, patience=2)
    whole = training.Tiny()
    training(whole, [EarlyStopping(config, run, "auroc", score_at(whole, 0)), keeper("whole")], steps=12)
    part = training.Tiny(at={killed: kill})
    stop = EarlyStopping(config, run, "auroc", score_at(part, 0))
    try:
        training(part, [stop, keeper("part")], steps=12)
    except Killed:
        start = load(tmp_path / "part.ckpt")["sslmed"]["step"]
        part = training.Tiny()
        stop = EarlyStopping(config, run, "auroc", score_at(part, start))
        training(part, [stop, keeper("part")], steps=12, resume=tmp_path / "part.ckpt")
    assert part.weights == whole.weights
    assert stop.best == max(scores[: 4 if scores[0] == 0.5 else 1])


def test_a_checkpoint_of_the_very_step_that_ended_training_trains_no_further(
    run: Run, training: Any, tmp_path: Path
) -> None:
    keeper = Checkpointer(tmp_path / "last.ckpt", 6, SignalWatch())
    module = training.Tiny()
    training(module, [stopping(run, [0.9, 0.1, 0.1]), keeper], steps=20)
    assert module.steps == 6
    again = training.Tiny()
    stop = stopping(run, [])
    training(again, [stop, keeper], steps=20, resume=tmp_path / "last.ckpt")
    assert again.steps == 0
    assert again.weights == module.weights
    assert stop.best_step == 2


@pytest.mark.parametrize("settings", [{"check_every": 0}, {"patience": -1}, {"patiense": 3}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        StopConfig(**settings)


def test_the_average_is_what_is_scored_and_kept(run: Run, training: Any) -> None:
    module, average = training.Tiny(), WeightAverage(0.9)
    scored: list[list[float]] = []
    averages: list[list[float]] = []

    def score() -> float:
        scored.append(module.weights)
        held = average.average
        averages.append([*held["layer.weight"].flatten().tolist(), *held["layer.bias"].tolist()])
        return [0.5, 0.9, 0.1][len(scored) - 1]

    stop = EarlyStopping(StopConfig(check_every=2, patience=0), run, "auroc", score, average)
    living: list[list[float]] = []
    watch = {5: lambda tiny: living.append(tiny.weights)}
    module.at = watch
    training(module, [average, stop], steps=6)
    assert len(scored) == 3
    assert scored == averages
    assert module.weights == scored[1], "the best check's average"
    assert living == [weights_after(training, 4)], "training went on from its own weights"


# As above, killed before and after checks at 2, 4, ... and saves at 3, 6, ...
@pytest.mark.parametrize("killed", [4, 5, 7, 8])
def test_killed_and_resumed_with_an_average_it_ends_with_the_same_weights(
    killed: int, run: Run, training: Any, tmp_path: Path
) -> None:
    scores = [0.5, 0.6, 0.9, 0.1, 0.2, 0.3]

    def callbacks(module: Any, name: str, start: int = 0) -> list[Any]:
        average = WeightAverage(0.8)

        def score() -> float:
            return scores[(start + module.steps) // 2 - 1]

        stop = EarlyStopping(StopConfig(check_every=2, patience=3), run, "auroc", score, average)
        return [average, stop, Checkpointer(tmp_path / f"{name}.ckpt", 3, SignalWatch())]

    whole = training.Tiny()
    training(whole, callbacks(whole, "whole"), steps=12)
    part = training.Tiny(at={killed: kill})
    with pytest.raises(Killed):
        training(part, callbacks(part, "part"), steps=12)
    start = load(tmp_path / "part.ckpt")["sslmed"]["step"]
    part = training.Tiny()
    training(part, callbacks(part, "part", start), steps=12, resume=tmp_path / "part.ckpt")
    assert part.weights == whole.weights
