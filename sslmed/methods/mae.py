"""MAE: masked autoencoders are scalable vision learners (He et al., arXiv 2111.06377)."""

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from sslmed import config
from sslmed.config import UsageError
from sslmed.data.geometry_view import geometry_view, idle_knobs
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit
from sslmed.models.backbones import Backbone, BackboneConfig
from sslmed.models.decoders import MAEDecoder, sine_cosine_positions, xavier
from sslmed.models.masking import (
    foreground_mask,
    foreground_patches,
    keyed_noise,
    patchify,
    random_mask,
    unpatchify,
)
from sslmed.models.token_encoder import TokenEncoder

VARIANCE_FLOOR = 1e-6  # reference; in float16 it would be lost, hence targets in float32
ROWS = 8  # of pictures


class MAEConfig(config.Config):
    """The knobs of MAE.

    Attributes:
        mask_ratio: share of the patches that the encoder does not see: 0.75 in the paper (figure 5); 0.90 for chest
            X-rays in Medical MAE (arXiv 2210.12843).
        norm_pix: predict each patch's pixels less their mean and over their deviation (section 4.1, "Reconstruction
            target"); ``false`` predicts the pixels.
        decoder_width: of the decoder; a multiple of 4 and of ``decoder_heads``.
        decoder_depth: its blocks. Width, depth and heads are the reference's; on small images less is enough.
        decoder_heads: its attention heads.
        foreground: hide ``mask_ratio`` of the patches that show something, and count no loss on flat ones.
    """

    name: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_pix: bool = True
    decoder_width: Annotated[int, Field(ge=4)] = 512
    decoder_depth: Annotated[int, Field(ge=1)] = 8
    decoder_heads: Annotated[int, Field(ge=1)] = 16
    foreground: bool = False

    @model_validator(mode="after")
    def _width_divides(self) -> Self:
        for name, divisor in (("decoder_heads", self.decoder_heads), ("sine-cosine positions", 4)):
            if self.decoder_width % divisor:
                raise ValueError(f"decoder_width is {self.decoder_width}; allowed with {name}: multiples of {divisor}")
        return self


class MAE(Method):
    """Most patches are hidden; from the others an encoder and a small decoder predict their pixels."""

    Config = MAEConfig
    example = BackboneConfig(name="test_vit", patch=8)
    example_settings: ClassVar[dict[str, Any]] = {"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4}
    overfit = Overfit(steps=160, ratio=0.2)  # predicting each patch's mean is 0.5
    config: MAEConfig

    def __init__(self, config: MAEConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.encoder = TokenEncoder(backbone, config.name)
        self.channels: int = self.encoder.network.patch_embed.proj.in_channels
        rows, columns = self.encoder.grid
        self.keep = int(rows * columns * (1 - config.mask_ratio))
        if not self.keep:
            raise UsageError(
                f"'method.mask_ratio' is {config.mask_ratio}, which leaves none of {rows} x {columns} patches; "
                "lower it, lower backbone.patch or raise data.size"
            )
        positions = sine_cosine_positions(self.encoder.width, self.encoder.grid)
        if not backbone.pretrained:
            initialise(self.encoder)
        if not backbone.pretrained or self.encoder.has_positions(positions):  # an earlier MAE's stay fixed
            self.encoder.fix_positions(positions)
        values = self.encoder.patch[0] * self.encoder.patch[1] * self.channels
        self.decoder = MAEDecoder(
            self.encoder.width,
            self.encoder.grid,
            self.encoder.prefix,
            values,
            config.decoder_width,
            config.decoder_depth,
            config.decoder_heads,
        )

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One view: the modality's geometry, and intensities as they are, since they are what is predicted."""
        return (geometry_view(modality),)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Names the settings of views that do nothing here."""
        return idle_knobs(modality, self.config.name)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The error of the predicted pixels on hidden patches; the embedding is the mean of the visible tokens."""
        patches = patchify(batch.views[0], self.encoder.patch)
        keep_ids, hidden, counted = self._mask(patches, batch)
        tokens, prediction = self._predict(batch.views[0], keep_ids)
        outputs = {
            "loss": reconstruction_error(prediction, patches, counted, self.config.norm_pix),
            "embeddings": tokens[:, self.encoder.prefix :].mean(dim=1),
        }
        if self.config.foreground:
            outputs["foreground"] = counted.sum() / hidden.sum()
        return outputs

    def pictures(self, batch: Batch) -> torch.Tensor:
        """For each of the first images the original, what the encoder sees, and the hidden patches as predicted."""
        images = batch.views[0][:ROWS]
        few = replace(batch, views=[images], ids=batch.ids[:ROWS])
        patches = patchify(images, self.encoder.patch).float()
        keep_ids, hidden, _ = self._mask(patches, few)
        _, prediction = self._predict(images, keep_ids)
        prediction = prediction.float()
        if self.config.norm_pix:
            mean, deviation = _statistics(patches)
            prediction = prediction * deviation + mean
        middle = (images.amin(dim=(1, 2, 3)) + images.amax(dim=(1, 2, 3)))[:, None, None].float() / 2
        columns = [patches, *(torch.where(hidden[..., None], fill, patches) for fill in (middle, prediction))]
        return torch.stack([unpatchify(each, self.encoder.grid, self.encoder.patch) for each in columns], dim=1)

    def _mask(self, patches: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions that stay (N, K), where patches are hidden (N, L), and which of those count (N, L)."""
        noise = keyed_noise(batch.seed, batch.epoch, batch.ids, patches.shape[1], "mask").to(patches.device)
        if not self.config.foreground:
            keep_ids, hidden = random_mask(noise, self.keep)
            return keep_ids, hidden, hidden
        foreground = foreground_patches(patches, self.channels)
        keep_ids, hidden = foreground_mask(noise, foreground, self.keep, self.config.mask_ratio)
        return keep_ids, hidden, hidden & foreground

    def _predict(self, images: torch.Tensor, keep_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's tokens (N, prefix + K, D) and the decoder's prediction (N, L, values)."""
        tokens = self.encoder.encode(self.encoder.embed(images), keep_ids)
        return tokens, self.decoder(tokens, keep_ids, self.encoder.checkpoints)


def reconstruction_error(
    prediction: torch.Tensor, patches: torch.Tensor, counted: torch.Tensor, norm_pix: bool
) -> torch.Tensor:
    """Mean squared error over a patch's values, then an image's counted patches, then images.

    With equal counts this is the reference's sum(loss * mask) / sum(mask). An image without counted patches adds 0.

    Args:
        prediction: (N, L, values).
        patches: the true values, alike.
        counted: (N, L), true where a patch counts.
    """
    precision = torch.promote_types(prediction.dtype, torch.float32)
    target = patches.to(precision)
    if norm_pix:
        mean, deviation = _statistics(target)
        target = (target - mean) / deviation
    error = (prediction.to(precision) - target).square().mean(dim=2)
    return ((error * counted).sum(dim=1) / counted.sum(dim=1).clamp_min(1)).mean()


def initialise(encoder: TokenEncoder) -> None:
    """The reference's initial weights: xavier-uniform, fixed sine-cosine positions, class token N(0, 0.02^2).

    Registers are drawn like the class token; the patch embedding is drawn as the linear layer that it is, bias 0.
    """
    network = encoder.network
    xavier(network)
    projection = network.patch_embed.proj
    bound = math.sqrt(6 / sum(projection.weight.flatten(1).shape))  # xavier's; flat views of channels_last are copies
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    for token in (network.cls_token, network.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)


def _statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each patch's mean and deviation, (N, L, 1); the variance is the unbiased one."""
    return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + VARIANCE_FLOOR).sqrt()
