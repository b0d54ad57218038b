"""The moving average against its formula; checkpoints in between; what is left of it outside of training."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sslmed.training.averaging import WeightAverage
from sslmed.training.checkpoint import Checkpointer
from sslmed.training.checkpoint_files import load
from sslmed.training.signals import SignalWatch


class Record(pl.Callback):
    """The weights, buffers included, after each optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.states.append(copy(pl_module))


def copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def with_norm(training: Any, at: dict[int, Any] | None = None) -> Any:
    """The tiny training behind a BatchNorm, whose statistics and counter move too."""

    class Normed(training.Tiny):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(at)
            self.norm = torch.nn.BatchNorm1d(2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(self.norm(batch) + 0.5 * batch, batch_idx)

    return Normed()


def closed_form(first: torch.Tensor, states: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Every state times its coefficient: (1 - d_t) and the product of all d that come later."""
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(1, len(states) + 1)]
    coefficients = []
    for number, each in enumerate(decays):
        later = torch.tensor(decays[number + 1 :], dtype=torch.float64).prod()
        coefficients.append((1 - each) * later)
    whole = torch.tensor(decays, dtype=torch.float64).prod() * first.double()
    return whole + sum(c * state.double() for c, state in zip(coefficients, states, strict=True))


@pytest.mark.parametrize("decay", [0.1, 0.35, 0.99])  # less than the ramp at once, from the fourth step on, never
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_average_is_the_closed_form(decay: float, accumulate: int, training: Any) -> None:
    module, average, record = with_norm(training), WeightAverage(decay), Record()
    first = copy(module)
    training(module, [average, record], steps=6, accumulate=accumulate)
    assert len(record.states) == 6
    for name, tensor in average.average.items():
        states = [state[name] for state in record.states]
        if tensor.is_floating_point():
            expected = closed_form(first[name], states, decay).to(tensor.dtype)
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
            assert not torch.equal(tensor, states[-1]), "parameters and BatchNorm's statistics alike"
        else:
            assert torch.equal(tensor, states[-1]), "the counter of batches is no average"
    assert "norm.running_mean" in average.average


def test_it_leaves_training_as_it_is(training: Any) -> None:
    plain, averaged = training.Tiny(), training.Tiny()
    training(plain)
    training(averaged, [WeightAverage(0.9)])
    assert averaged.weights == plain.weights


def test_applied_restores_the_weights_bit_for_bit(training: Any) -> None:
    module, average = with_norm(training), WeightAverage(0.9)
    training(module, [average], steps=4)
    before, places = copy(module), {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in average.average.items()}
    with average.applied(module):
        inside = copy(module)
        with torch.no_grad():
            module.layer.weight.add_(1)  # what is done inside stays inside
    assert all(torch.equal(inside[name], kept[name]) for name in kept)
    assert any(not torch.equal(inside[name], before[name]) for name in kept)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].data_ptr() == places[name] for name in places), "an optimizer holds on to them"
    assert all(torch.equal(average.average[name], kept[name]) for name in kept)
    with pytest.raises(RuntimeError, match="inside"), average.applied(module):
        raise RuntimeError("inside")
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)


def test_a_decay_of_zero_averages_nothing(training: Any) -> None:
    module, average = training.Tiny(), WeightAverage(0)
    training(module, [average])
    before = copy(module)
    with average.applied(module):
        assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)
    assert average.state_dict() == {"average": {}}


class Killed(Exception):
    pass


def kill(_: Any) -> None:
    raise Killed


@pytest.mark.parametrize("killed", [2, 4, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_and_resumed_it_is_the_same_average(killed: int, accumulate: int, training: Any, tmp_path: Path) -> None:
    whole, path = WeightAverage(0.4), tmp_path / "last.ckpt"
    training(with_norm(training), [whole], steps=7, accumulate=accumulate)
    first = with_norm(training, {killed * accumulate: kill})
    with pytest.raises(Killed):
        training(first, [WeightAverage(0.4), Checkpointer(path, 1, SignalWatch())], steps=7, accumulate=accumulate)
    assert load(path)["sslmed"]["step"] == killed - 1
    part = WeightAverage(0.4)
    keeper = Checkpointer(path, 1, SignalWatch())
    training(with_norm(training), [part, keeper], steps=7, accumulate=accumulate, resume=path)
    assert part.average.keys() == whole.average.keys()
    assert all(torch.equal(part.average[name], whole.average[name]) for name in whole.average)


def test_a_checkpoint_holds_no_living_weights(training: Any) -> None:
    average = WeightAverage(0.9)
    module = training.Tiny()
    training(module, [average], steps=2)
    other = WeightAverage(0.9)
    other.load_state_dict(average.state_dict())
    with torch.no_grad():
        module.layer.weight.zero_()
    assert other.average["layer.weight"].abs().sum() > 0
