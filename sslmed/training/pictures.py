"""What the network makes of images, as PNG files in the run folder."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from sslmed import distributed
from sslmed.data.writers import write_image
from sslmed.run import Run

GAP = 2  # pixels between pictures


class Pictures(pl.Callback):
    """Writes ``plots/step-000500.png`` with what the method's ``pictures`` returns for the batch of that step.

    The method is asked in evaluation mode and leaves no trace: a run with pictures has the same weights as one without.
    """

    def __init__(self, run: Run, every: int) -> None:
        """``every`` counts optimizer steps; 0 is at the end alone, where there is one in any case."""
        self.folder = run.path / "plots"
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or distributed.rank():
            return
        if step == trainer.max_steps or (self.every and step % self.every == 0):
            pictures = _looking(pl_module, batch)
            if pictures is not None:
                self.folder.mkdir(exist_ok=True)
                write_image(self.folder / f"step-{step:06}.png", mosaic(pictures))


def mosaic(pictures: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pictures (rows, columns, C, H, W) as one image, (height, width) grey or (height, width, 3) of three channels.

    A row's grey values run from the least to the greatest value of its first picture, the original; what lies outside
    is cut off. Of two channels, or more than three, the first is shown. White lines part the pictures.
    """
    shown = pictures.detach().float().cpu().numpy()
    shown = np.moveaxis(shown if shown.shape[2] == 3 else shown[:, :, :1], 2, -1)
    low, high = (edge(shown[:, :1], axis=(1, 2, 3, 4), keepdims=True) for edge in (np.min, np.max))
    unit = (shown - low) / np.where(high > low, high - low, 1)
    levels = np.rint(255 * np.clip(np.nan_to_num(unit), 0, 1)).astype(np.uint8)
    parted = np.pad(levels, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, channels = parted.shape
    whole = parted.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)[:-GAP, :-GAP]
    return np.ascontiguousarray(whole[..., 0] if channels == 1 else whole)


def _looking(module: Any, batch: Any) -> torch.Tensor | None:
    """The method's pictures of ``batch``; modes and random state stay as they are."""
    modes = {part: part.training for part in module.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            pictures: torch.Tensor | None = module.pictures(batch)
    finally:
        for part, training in modes.items():
            part.training = training
    return pictures
