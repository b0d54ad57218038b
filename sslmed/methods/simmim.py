"""SimMIM: a simple framework for masked image modeling (Xie et al., arXiv 2111.09886)."""

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sslmed import config
from sslmed.config import UsageError
from sslmed.data.geometry_view import geometry_view, idle_knobs
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit
from sslmed.models.backbones import Backbone, BackboneConfig
from sslmed.models.decoders import sine_cosine_positions, truncated
from sslmed.models.masking import enlarged, keyed_noise, patchify, random_mask, unpatchify
from sslmed.models.token_encoder import TokenEncoder
from sslmed.optim import Parameters

ROWS = 8  # of pictures


class SimMIMConfig(config.Config):
    """The knobs of SimMIM.

    Attributes:
        mask_ratio: share of the squares that are hidden, rounded up to whole ones; 0.6 in the reference.
        mask_patch: side of the squares that are hidden, pixels, a multiple of the backbone's patch that divides the
            image. The paper's 32 (section 4.1.2, table 1) is for images of 192 and 224 pixels; smaller images need
            smaller squares.
    """

    name: Literal["simmim"] = "simmim"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    mask_patch: Annotated[int, Field(ge=1)] = 32


class SimMIM(Method):
    """The encoder sees a mask token where patches are hidden; one linear layer predicts their pixels."""

    Config = SimMIMConfig
    example = BackboneConfig(name="test_vit", patch=8)
    example_settings: ClassVar[dict[str, Any]] = {"mask_patch": 8}
    overfit = Overfit(steps=100, ratio=0.5)
    config: SimMIMConfig

    def __init__(self, config: SimMIMConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.encoder = TokenEncoder(backbone, config.name)
        self.times = self._patches_a_square()
        self.squares = self.encoder.grid[0] // self.times[0], self.encoder.grid[1] // self.times[1]
        count = self.squares[0] * self.squares[1]
        self.keep = count - math.ceil(count * config.mask_ratio)
        if not self.keep:
            raise UsageError(
                f"'method.mask_ratio' is {config.mask_ratio} and 'method.mask_patch' {config.mask_patch}, which hides "
                f"all of {self.squares[0]} x {self.squares[1]} squares; lower one of them or raise data.size"
            )
        positions = sine_cosine_positions(self.encoder.width, self.encoder.grid)
        if not backbone.pretrained or self.encoder.has_positions(positions):
            # the reference's relative position biases timm's transformers lack; learnt positions begin near 0, where
            # all hidden patches look alike
            self.encoder.fix_positions(positions)
        if not backbone.pretrained:
            truncated(self.encoder.network, self.encoder.network.blocks)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        channels: int = self.encoder.network.patch_embed.proj.in_channels
        self.head = nn.Linear(self.encoder.width, self.encoder.patch[0] * self.encoder.patch[1] * channels)

    def parameter_groups(self, weight_decay: float) -> Parameters:
        """The class token does not decay, the mask token does (reference, vision_transformer.py, optimizer.py)."""
        decayed, free = super().parameter_groups(weight_decay)
        token = [each for each in decayed["params"] if each is self.encoder.network.cls_token]
        decayed["params"] = [each for each in decayed["params"] if each is not self.encoder.network.cls_token]
        return [decayed, free | {"params": [*free["params"], *token]}]

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One view: the modality's geometry, and intensities as they are, since they are what is predicted."""
        return (geometry_view(modality),)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Names the settings of views that do nothing here."""
        return idle_knobs(modality, self.config.name)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The error of the predicted pixels on hidden patches; the embedding is the mean of the visible tokens."""
        images = batch.views[0]
        hidden = self._hidden(batch).to(images.device)
        tokens, prediction = self._predict(images, hidden)
        seen = (~hidden)[..., None]
        return {
            "loss": pixel_error(prediction, patchify(images, self.encoder.patch), hidden),
            "embeddings": (tokens * seen).sum(dim=1) / seen.sum(dim=1),
        }

    def pictures(self, batch: Batch) -> torch.Tensor:
        """For each of the first images the original, what the encoder sees, and the hidden patches as predicted."""
        images = batch.views[0][:ROWS]
        hidden = self._hidden(replace(batch, views=[images], ids=batch.ids[:ROWS])).to(images.device)
        patches = patchify(images, self.encoder.patch).float()
        prediction = self._predict(images, hidden)[1].float()
        middle = (images.amin(dim=(1, 2, 3)) + images.amax(dim=(1, 2, 3)))[:, None, None].float() / 2
        columns = [patches, *(torch.where(hidden[..., None], fill, patches) for fill in (middle, prediction))]
        return torch.stack([unpatchify(each, self.encoder.grid, self.encoder.patch) for each in columns], dim=1)

    def _patches_a_square(self) -> tuple[int, int]:
        patch, grid, side = self.encoder.patch, self.encoder.grid, self.config.mask_patch
        height, width = grid[0] * patch[0], grid[1] * patch[1]
        if side % patch[0] or side % patch[1] or height % side or width % side:
            raise UsageError(
                f"'method.mask_patch' is {side}; allowed with patches of {patch[0]} x {patch[1]} in images of {height} "
                f"x {width} pixels: multiples of the patch that divide the image's sides"
            )
        return side // patch[0], side // patch[1]

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Where patches are hidden, (N, L), on the CPU."""
        count = self.squares[0] * self.squares[1]
        noise = keyed_noise(batch.seed, batch.epoch, batch.ids, count, "mask")
        return enlarged(random_mask(noise, self.keep)[1], self.squares, self.times)

    def _predict(self, images: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of all patches (N, L, D), and the pixels that they predict (N, L, values)."""
        shown = self.encoder.cover(self.encoder.embed(images), hidden, self.mask_token)
        tokens = self.encoder.encode(shown)[:, self.encoder.prefix :]
        return tokens, self.head(tokens)


def pixel_error(prediction: torch.Tensor, patches: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Mean absolute error over the values of hidden patches (arXiv 2111.09886, equation 1).

    The reference adds 1e-5 to the number of hidden pixels, so as not to divide by 0; here some are always hidden.

    Args:
        prediction: (N, L, values).
        patches: the true values, alike.
        hidden: (N, L), as many in every image.
    """
    precision = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(precision) - patches.to(precision)).abs().mean(dim=2)
    return (error * hidden).sum() / hidden.sum()
