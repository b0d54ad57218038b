"""Denoising autoencoder (Vincent et al., ICML 2008), with the coarse noise of Kascenas et al. (MIDL 2022)."""

from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from sslmed import config
from sslmed.data.loading import Batch
from sslmed.keyed_rng import rng
from sslmed.methods.restorative import Restorative
from sslmed.models.corruptions import coarse_field


class DenoisingConfig(config.Config):
    """The knobs of the denoising autoencoder.

    Attributes:
        sigma: least and greatest standard deviation of the noise; each image draws one. In units of the normalised
            image, whose range is about 4 wide: 0.8 is the 0.2 of the whole range of Kascenas et al.
        resolution: how many independent values of the noise fit along a side; between them it is bilinear. 16 in
            Kascenas et al., whose blots look like lesions; 0 draws every pixel by itself, as Vincent et al. do.
    """

    name: Literal["denoising"] = "denoising"
    sigma: tuple[Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(gt=0, le=10)]] = (0.8, 0.8)
    resolution: Annotated[int, Field(ge=0, le=256)] = 16

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma is {list(self.sigma)}; allowed: two numbers, the smaller first")
        return self


class Denoising(Restorative):
    """Noise is added to an image; the image without it is predicted."""

    Config = DenoisingConfig
    config: DenoisingConfig

    def corrupted(self, batch: Batch) -> torch.Tensor:
        """The images of the batch with noise, keyed by seed, epoch and each image's id."""
        images = batch.views[0]
        channels, *size = images.shape[1:]
        r = self.config.resolution
        shape = (channels, r + 2, r + 2) if r else (channels, *size)
        fields, phases = [], []
        for sample in batch.ids.tolist():
            stream = rng(batch.seed, batch.epoch, sample, "noise")
            phases.append(stream.random(2))
            fields.append(stream.uniform(*self.config.sigma) * stream.standard_normal(shape, dtype=np.float32))
        noise, phase = (torch.from_numpy(np.stack(each)).to(images) for each in (fields, phases))
        return images + (coarse_field(noise, phase, (size[0], size[1])) if r else noise)
