"""Pictures are written when due, in the original's grey values, and leave the training as it was."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sslmed.run import Run
from sslmed.training.pictures import GAP, Pictures, mosaic


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run.start(tmp_path / "run", "pretrain", "", {}) as run:
        return run


def painter(training: Any, *, pictures: bool = True) -> Any:
    """A tiny module with dropout, a part in evaluation mode, and pictures that draw random numbers."""

    class Painter(training.Tiny):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)
            self.frozen = torch.nn.BatchNorm1d(2)
            self.asked: list[tuple[int, bool, bool]] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.frozen.eval()
            assert self.training
            assert self.dropout.training
            return super().training_step(self.dropout(self.frozen(batch)), batch_idx)

        def pictures(self, batch: torch.Tensor) -> torch.Tensor | None:
            self.asked.append((self.steps, self.training or self.dropout.training, torch.is_grad_enabled()))
            return torch.rand(2, 3, 1, 4, 5) if pictures else None

    return Painter()


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4, 6, 7]), (0, [7]), (7, [7]), (100, [7])])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_file_every_so_many_steps_and_at_the_end(
    every: int, steps: list[int], accumulate: int, run: Run, training: Any
) -> None:
    module = painter(training)
    training(module, [Pictures(run, every)], steps=7, accumulate=accumulate)
    assert sorted(path.name for path in (run.path / "plots").iterdir()) == [f"step-{step:06}.png" for step in steps]
    assert module.asked == [(step * accumulate, False, False) for step in steps]


def test_nothing_is_written_for_a_method_without_pictures(run: Run, training: Any) -> None:
    training(painter(training, pictures=False), [Pictures(run, 1)])
    assert not (run.path / "plots").exists()


def test_the_training_is_the_same_with_and_without(run: Run, training: Any) -> None:
    weights = []
    for callbacks in ([], [Pictures(run, 1)]):
        module = painter(training)
        training(module, callbacks)
        weights.append(module.weights)
        assert not module.frozen.training
    assert weights[0] == weights[1]


def test_a_file_holds_the_pictures(run: Run, training: Any) -> None:
    module = painter(training)
    shown = torch.linspace(-2, 2, 2 * 3 * 3 * 4 * 5).view(2, 3, 3, 4, 5)
    module.pictures = lambda _: shown
    training(module, [Pictures(run, 0)], steps=1)
    found = cv2.imread(str(run.path / "plots" / "step-000001.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(found[..., ::-1], mosaic(shown))


def test_grey_values_are_those_of_the_original_of_the_row() -> None:
    original = torch.tensor([[-2.0, 0.0], [1.0, 2.0]])
    other = torch.tensor([[-9.0, 9.0], [0.5, torch.nan]])
    rows = torch.stack([original, other]), torch.stack([10 * original, original])
    found = mosaic(torch.stack(rows)[:, :, None])
    assert found.dtype == np.uint8
    assert found.shape == (2 * 2 + GAP, 2 * 2 + GAP)
    assert found[:2, :2].tolist() == [[0, 128], [191, 255]]
    assert found[:2, 2 + GAP :].tolist() == [[0, 255], [159, 0]]
    assert found[2 + GAP :, :2].tolist() == [[0, 128], [191, 255]]
    assert found[2 + GAP :, 2 + GAP :].tolist() == [[115, 128], [134, 140]]
    assert (found[2:4] == 255).all()
    assert (found[:, 2:4] == 255).all()


def test_colour_stays_and_of_other_channels_the_first_is_shown() -> None:
    pictures = torch.rand(1, 1, 3, 4, 5)
    low, high = pictures.min(), pictures.max()
    expected = (255 * (pictures[0, 0] - low) / (high - low)).round().permute(1, 2, 0).numpy()
    assert np.array_equal(mosaic(pictures), expected)
    for channels in (2, 4):
        many = torch.rand(1, 1, channels, 4, 5)
        assert np.array_equal(mosaic(many), mosaic(many[:, :, :1]))


def test_a_flat_original_is_black() -> None:
    assert not mosaic(torch.full((1, 2, 1, 4, 4), 3.0))[:, :4].any()
