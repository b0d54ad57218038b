"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al., arXiv 2111.07832), with DINOv2's KoLeo."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.multi_crop import GLOBAL_VIEWS, MultiCropConfig
from sslmed.data.views import ViewConfig
from sslmed.keyed_rng import rng
from sslmed.methods.method import Course, Method, Overfit, Progress
from sslmed.models.backbones import Backbone, BackboneConfig, in_timm
from sslmed.models.blockwise import blockwise_mask
from sslmed.models.koleo import koleo
from sslmed.models.momentum import cosine_momentum, follow, follower, momentum_at, momentum_notes
from sslmed.models.self_distillation import (
    Centre,
    DistillationConfig,
    DistillationHead,
    distillation_loss,
    entropy,
    log_softmax,
    targets,
)
from sslmed.models.token_encoder import TokenEncoder
from sslmed.models.twins import twin_accuracy
from sslmed.models.view_sizes import accept_scale, of_each_view
from sslmed.optim import clip_each

Ratio = Annotated[float, Field(ge=0, lt=1)]


class IBOTConfig(MultiCropConfig, DistillationConfig):
    """The knobs of iBOT; those of its crops, and those of its heads and teacher.

    Attributes:
        local_views: see `MultiCropConfig`; 10 in the reference (README).
        out: see `DistillationConfig`; 8192 in the paper.
        shared_head: class token and patches go through one head, as in the paper's best (table 9); ``false`` gives
            the patches one of their own.
        masked_views: share of the whole views that have hidden patches.
        mask_ratio: least and greatest share of the patches that are hidden in those. With the former this is the
            reference's "0, or 0.3 up to 0.2 either way", and DINOv2's.
        patch_weight: of the patches' loss beside the class token's.
        koleo: weight of KoLeo, 0.1 in DINOv2 (arXiv 2304.07193); iBOT itself has none.
    """

    name: Literal["ibot"] = "ibot"
    local_views: Annotated[int, Field(ge=0, le=32)] = 10
    out: Annotated[int, Field(ge=2)] = 8192
    shared_head: bool = True
    masked_views: Annotated[float, Field(gt=0, le=1)] = 0.5
    mask_ratio: tuple[Ratio, Ratio] = (0.1, 0.5)
    patch_weight: Annotated[float, Field(ge=0)] = 1.0
    koleo: Annotated[float, Field(ge=0)] = 0.1

    @model_validator(mode="after")
    def _ratio_ascends(self) -> Self:
        low, high = self.mask_ratio
        if low > high or not high:
            raise ValueError(
                f"mask_ratio is [{low}, {high}]; allowed: from 0 to below 1, the smaller first, not both 0"
            )
        return self


class IBOT(Method):
    """DINO, and for hidden patches of the whole views what the teacher, which sees them, makes of each."""

    Config = IBOTConfig
    compares_views = True
    example = BackboneConfig(name="test_vit", patch=8)
    example_settings: ClassVar[dict[str, Any]] = {  # eight images and fifty steps: short memories, more KoLeo
        "out": 64,
        "hidden": 64,
        "bottleneck": 256,
        "local_views": 1,
        "momentum": 0.9,
        "momentum_rule": "constant",
        "centre_momentum": 0.0,
        "first_temperature": 0.02,
        "koleo": 0.3,
    }
    overfit = Overfit(steps=50, ratio=0.5)
    config: IBOTConfig

    def __init__(self, config: IBOTConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.encoder = TokenEncoder(backbone, config.name)
        if self.encoder.network.cls_token is None:
            raise UsageError(
                f"ibot needs a class token, and {in_timm(self.encoder.network)} has none; take a network with one, "
                "such as vit_tiny_patch16_224"
            )
        self.local_scale = accept_scale(backbone, config.local_scale) if config.local_views else 1.0
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.width))
        self.head = DistillationHead(self.encoder.width, config)
        self.patch_head = self.head if config.shared_head else DistillationHead(self.encoder.width, config)
        self.teacher_backbone = follower(self.backbone)
        self.teacher_encoder = TokenEncoder(self.teacher_backbone, config.name)
        self.teacher_head = follower(self.head)
        self.teacher_patch_head = self.teacher_head if config.shared_head else follower(self.patch_head)
        self.centre = Centre(config.out, config.centre_momentum)
        self.patch_centre = Centre(config.out, config.centre_momentum)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """Two whole views and smaller ones, which differ in nothing else."""
        return self.config.crops(modality, self.local_scale)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """What of the views is idle, what the momentum becomes at this batch size, and what never trains."""
        return [
            *self.config.crop_notes(modality, self.local_scale),
            *momentum_notes(course.batch_size, self.config.momentum, self.config.momentum_rule),
            *self.config.freeze_notes(course.epochs),
        ]

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """DINO's loss of class tokens, where the student's whole views have holes, and that of the hidden patches."""
        config, temperature = self.config, self.config.temperature(batch.epoch)
        whole = torch.cat(batch.views[:GLOBAL_VIEWS])
        hidden = self._hidden(batch).to(whole.device)
        tokens = self.encoder.encode(self.encoder.cover(self.encoder.embed(whole), hidden, self.mask_token))
        classes = tokens[:, 0].unflatten(0, (GLOBAL_VIEWS, -1))
        if batch.views[GLOBAL_VIEWS:]:
            classes = torch.cat([classes, of_each_view(self._class_token, batch.views[GLOBAL_VIEWS:])])
        with torch.no_grad():
            seen = self.teacher_encoder.encode(self.teacher_encoder.embed(whole))
            taught = self.teacher_head.embed(seen[:, 0]).unflatten(0, (GLOBAL_VIEWS, -1))
            teacher = self.teacher_head.logits(taught)
            patches = self.teacher_patch_head.embed(seen[:, self.encoder.prefix :])
            means = self.teacher_patch_head.logits(patches.mean(dim=1))  # of all logits, which are linear
            taught_patches = self.teacher_patch_head.logits(patches[hidden])
        self.centre.note(self, teacher)
        self.patch_centre.note(self, means)
        embedded = self.head.embed(classes)
        of_classes = distillation_loss(
            self.head.logits(embedded).transpose(0, 1),
            teacher.transpose(0, 1),
            self.centre.value,
            config.student_temperature,
            temperature,
        )
        student = self.patch_head(tokens[:, self.encoder.prefix :][hidden])
        of_patches = patch_loss(
            student, taught_patches, hidden, self.patch_centre.value, config.student_temperature, temperature
        )
        loss = of_classes + config.patch_weight * of_patches
        found = {"class_loss": of_classes, "patch_loss": of_patches}
        if config.koleo:  # of each whole view by itself: two views of an image are not to be pushed apart
            found["koleo"] = sum((koleo(view, batch.groups) for view in classes[:GLOBAL_VIEWS]), loss.new_zeros(()))
            loss = loss + config.koleo * found["koleo"]
        found["twin_accuracy"] = twin_accuracy(embedded[0], taught[1])
        found["teacher_entropy"] = entropy(targets(teacher, self.centre.value, temperature)) / math.log(config.out)
        return {"loss": loss, "embeddings": embedded[0], **{name: value.detach() for name, value in found.items()}}

    def before_step(self, progress: Progress) -> None:
        """Each tensor's gradient is clipped by itself, as in the reference; frozen last layers have none."""
        if self.config.clip:
            clip_each(self.parameters(), self.config.clip)
        if progress.epoch < self.config.freeze_last_layer:
            for parameter in [*self.head.last_layer(), *self.patch_head.last_layer()]:
                parameter.grad = None

    def after_step(self, progress: Progress) -> None:
        """The teacher follows with the momentum of the step's number counted from 0, and the centres move."""
        base = momentum_at(progress.batch_size, self.config.momentum, self.config.momentum_rule)
        online, average = self.averaged
        follow(average, online, cosine_momentum(base, progress.step - 1, progress.total))
        self.centre.move()
        self.patch_centre.move()

    @property
    def averaged(self) -> tuple[nn.Module, nn.Module]:
        """Backbone and heads, and the teacher's."""
        online = nn.ModuleList([self.backbone, self.head, self.patch_head])
        return online, nn.ModuleList([self.teacher_backbone, self.teacher_head, self.teacher_patch_head])

    @property
    def exported(self) -> nn.Module:
        """The teacher, which the paper evaluates."""
        return self.teacher_backbone.network

    def _class_token(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder.encode(self.encoder.embed(images))[:, 0]

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Which patches of the whole views, one view after the other, are hidden: (views * N, L)."""
        rows, columns = self.encoder.grid
        masks = []
        for view in range(GLOBAL_VIEWS):
            for sample in batch.ids.tolist():
                stream = rng(batch.seed, batch.epoch, sample, f"mask{view}")
                masked = stream.random() < self.config.masked_views
                count = int(stream.uniform(*self.config.mask_ratio) * rows * columns) if masked else 0
                masks.append(torch.from_numpy(blockwise_mask(stream, self.encoder.grid, count)).flatten())
        return torch.stack(masks)


def patch_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    hidden: torch.Tensor,
    centre: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """Cross-entropy of the student with the teacher at hidden patches, mean over those of an image, then over images.

    arXiv 2111.07832, equation 2; images without hidden patches count, with 0, as in the reference (main_ibot.py) and
    in DINOv2's. In fp32 or better.

    Args:
        student: logits (M, K) of all M hidden patches, image by image.
        teacher: those of the same patches, unhidden; no gradient reaches them.
        hidden: (N, L), true M times.
        centre: (K,), taken from the teacher's.
    """
    with torch.autocast(student.device.type, enabled=False):
        prediction = log_softmax(student, student_temperature)
        each = -(targets(teacher, centre, teacher_temperature).to(prediction.dtype) * prediction).sum(dim=1)
        share = 1 / hidden.sum(dim=1, keepdim=True).clamp_min(1).to(each.dtype)
        return (each * share.expand_as(hidden)[hidden]).sum() / len(hidden)
