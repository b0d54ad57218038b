"""I-JEPA: an image-based joint-embedding predictive architecture (Assran et al., arXiv 2301.08243)."""

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from sslmed import config
from sslmed.data.geometry_view import geometry_view, idle_knobs
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit, Progress
from sslmed.models.backbones import Backbone, BackboneConfig
from sslmed.models.block_masks import BlockRule
from sslmed.models.decoders import JEPAPredictor, sine_cosine_positions, truncated
from sslmed.models.masking import take_tokens
from sslmed.models.momentum import MomentumRule, follow, follower, momentum_at, momentum_notes
from sslmed.models.token_encoder import TokenEncoder

GEOMETRY = ("crop", "aspect", "rotate")
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


class IJEPAConfig(config.Config):
    """The knobs of I-JEPA. Defaults are those of the reference's in1k_vith14_ep300.yaml.

    Attributes:
        momentum: of the target encoder at the start; a straight line leads it to 1.
        momentum_rule: ``constant``, as it is at any batch; ``scaled``, quoted for batch 256 and to the power of B / 256
            at global batch B (arXiv 2307.13813). The reference's 0.996 is for batch 2048; a set a thousand times
            smaller than ImageNet needs a shorter memory.
        targets: blocks that are predicted from one context.
        target_scale: least and greatest share of the patches that a block covers.
        target_aspect: its least and greatest height / width.
        context_scale: least and greatest share that the context covers before blocks are cut out.
        predictor_width: of the predictor; a multiple of 4 and of ``predictor_heads``.
        predictor_depth: its blocks.
        predictor_heads: its attention heads; the paper has as many as the encoder, 12 in ViT-B.
    """

    name: Literal["ijepa"] = "ijepa"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.996
    momentum_rule: MomentumRule = "constant"
    targets: Annotated[int, Field(ge=1, le=16)] = 4
    target_scale: tuple[Share, Share] = (0.15, 0.2)
    target_aspect: tuple[Ratio, Ratio] = (0.75, 1.5)
    context_scale: tuple[Share, Share] = (0.85, 1.0)
    predictor_width: Annotated[int, Field(ge=4)] = 384
    predictor_depth: Annotated[int, Field(ge=1)] = 12
    predictor_heads: Annotated[int, Field(ge=1)] = 12

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        for name in ("target_scale", "target_aspect", "context_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is [{low}, {high}]; allowed: the smaller number first")
        for name, divisor in (("predictor_heads", self.predictor_heads), ("sine-cosine positions", 4)):
            if self.predictor_width % divisor:
                raise ValueError(
                    f"predictor_width is {self.predictor_width}; allowed with {name}: multiples of {divisor}"
                )
        return self


class IJEPA(Method):
    """From the tokens of a context those of blocks around it are predicted, as a slowly following encoder has them."""

    Config = IJEPAConfig
    example = BackboneConfig(name="test_vit", patch=4)
    example_settings: ClassVar[dict[str, Any]] = {"predictor_width": 32, "predictor_depth": 1, "predictor_heads": 4}
    overfit = Overfit(steps=100, ratio=0.5)
    config: IJEPAConfig

    def __init__(self, config: IJEPAConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.encoder = TokenEncoder(backbone, config.name)
        self.rule = BlockRule(config.targets, config.target_scale, config.target_aspect, config.context_scale)
        self.rule.check(self.encoder.grid)
        positions = sine_cosine_positions(self.encoder.width, self.encoder.grid)
        if not backbone.pretrained:
            truncated(self.encoder.network, self.encoder.network.blocks)
        if not backbone.pretrained or self.encoder.has_positions(positions):
            self.encoder.fix_positions(positions)
        self.predictor = JEPAPredictor(
            self.encoder.width,
            self.encoder.grid,
            config.predictor_width,
            config.predictor_depth,
            config.predictor_heads,
        )
        self.target_backbone = follower(self.backbone)
        self.target = TokenEncoder(self.target_backbone, config.name)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One view: the modality's crop and tilt; no flips, no changed intensities (section 4, "Pretraining")."""
        return (geometry_view(modality, GEOMETRY),)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """What the momentum becomes at this batch size, and which settings of views do nothing."""
        return [
            *momentum_notes(course.batch_size, self.config.momentum, self.config.momentum_rule),
            *idle_knobs(modality, self.config.name, GEOMETRY),
        ]

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The error of the predicted tokens of all blocks; the embedding is the target's, of the whole image."""
        images = batch.views[0]
        drawn = self.rule.draw(self.encoder.grid, batch.seed, batch.epoch, batch.ids)
        context_ids, target_ids = (each.to(images.device) for each in drawn)
        with torch.no_grad():
            whole = self.target.encode(self.target.embed(images))[:, self.target.prefix :]
            wanted = take_tokens(whole, target_ids.flatten(1)).unflatten(1, target_ids.shape[1:])
        context = self.encoder.encode(self.encoder.embed(images), context_ids)[:, self.encoder.prefix :]
        prediction = self.predictor(context, context_ids, target_ids, self.encoder.checkpoints)
        return {"loss": latent_error(prediction, wanted), "embeddings": whole.mean(dim=1)}

    def after_step(self, progress: Progress) -> None:
        """The target follows, after the step, with the momentum of the step's number counted from 0."""
        base = momentum_at(progress.batch_size, self.config.momentum, self.config.momentum_rule)
        follow(self.target_backbone, self.backbone, base + (1 - base) * (progress.step - 1) / progress.total)

    @property
    def averaged(self) -> tuple[nn.Module, nn.Module]:
        """The encoder of the context, and the target's."""
        return self.backbone, self.target_backbone

    @property
    def exported(self) -> nn.Module:
        """The target encoder, which is what the paper evaluates (section 4)."""
        return self.target_backbone.network


def latent_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Smooth L1 error, beta 1, of predicted and target tokens (N, B, T, D), the mean over all.

    Targets are normalised over their features, without learnt scale or shift, and get no gradient. The paper writes
    the squared distance (arXiv 2301.08243, equation 1); norm and smooth L1 are the reference's (ijepa, src/train.py).
    """
    precision = torch.promote_types(prediction.dtype, torch.float32)
    with torch.autocast(prediction.device.type, enabled=False):
        wanted = F.layer_norm(target.detach().to(precision), target.shape[-1:])
        return F.smooth_l1_loss(prediction.to(precision), wanted)
