"""DINO: self-distillation with no labels (Caron et al., arXiv 2104.14294)."""

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.multi_crop import GLOBAL_VIEWS, MultiCropConfig
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit, Progress
from sslmed.models.backbones import Backbone
from sslmed.models.momentum import cosine_momentum, follow, follower, momentum_at, momentum_notes
from sslmed.models.self_distillation import (
    Centre,
    DistillationConfig,
    DistillationHead,
    distillation_loss,
    entropy,
    targets,
)
from sslmed.models.twins import twin_accuracy
from sslmed.models.view_sizes import accept_scale, of_each_view
from sslmed.optim import clip_each


class DINOConfig(MultiCropConfig, DistillationConfig):
    """The knobs of DINO; those of its crops, and those of its head and teacher.

    Attributes:
        local_views: see `MultiCropConfig`; 8 in the paper, 10 in the reference's longest trainings.
        head_batchnorm: BatchNorm after the head's hidden layers, the reference's ``use_bn_in_head``. For networks that
            have BatchNorm themselves: on small sets such a network makes nearly the same of all images at first, and
            without it the outputs become uniform. A transformer needs none.
    """

    name: Literal["dino"] = "dino"
    local_views: Annotated[int, Field(ge=0, le=32)] = 8
    head_batchnorm: bool = False


class DINO(Method):
    """A student that sees an image's parts predicts what a teacher, its own moving average, makes of the whole."""

    Config = DINOConfig
    compares_views = True
    sync_batchnorm = True  # the reference converts networks that have BatchNorm (main_dino.py)
    example_settings: ClassVar[dict[str, Any]] = {
        "out": 64,
        "hidden": 128,
        "bottleneck": 64,
        "local_views": 2,
        "momentum": 0.9,
        "momentum_rule": "constant",
    }
    overfit = Overfit(steps=30, ratio=0.5)
    config: DINOConfig

    def __init__(self, config: DINOConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.local_scale = accept_scale(backbone, config.local_scale) if config.local_views else 1.0
        self.head = DistillationHead(backbone.num_features, config, config.head_batchnorm)
        self.teacher_backbone = follower(self.backbone)
        self.teacher_head = follower(self.head)
        self.centre = Centre(config.out, config.centre_momentum)

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
        """The student sees all views, the teacher the whole ones; every pair of different views is compared."""
        embedded = self.head.embed(of_each_view(self.backbone, batch.views))
        student = self.head.logits(embedded)
        with torch.no_grad():
            seen = self.teacher_head.embed(of_each_view(self.teacher_backbone, batch.views[:GLOBAL_VIEWS]))
            teacher = self.teacher_head.logits(seen)
        self.centre.note(self, teacher)
        config, temperature = self.config, self.config.temperature(batch.epoch)
        centre = self.centre.value
        loss = distillation_loss(
            student.transpose(0, 1), teacher.transpose(0, 1), centre, config.student_temperature, temperature
        )
        return {
            "loss": loss,
            "embeddings": embedded[0],
            "twin_accuracy": twin_accuracy(embedded[0], seen[1]),
            "teacher_entropy": entropy(targets(teacher, centre, temperature)) / math.log(config.out),
        }

    def before_step(self, progress: Progress) -> None:
        """Each tensor's gradient is clipped by itself, as in the reference; a frozen last layer has none."""
        if self.config.clip:
            clip_each(self.parameters(), self.config.clip)
        if progress.epoch < self.config.freeze_last_layer:
            for parameter in self.head.last_layer():
                parameter.grad = None

    def after_step(self, progress: Progress) -> None:
        """The teacher follows with the momentum of the step's number counted from 0, and the centre moves."""
        base = momentum_at(progress.batch_size, self.config.momentum, self.config.momentum_rule)
        online, average = self.averaged
        follow(average, online, cosine_momentum(base, progress.step - 1, progress.total))
        self.centre.move()

    @property
    def averaged(self) -> tuple[nn.Module, nn.Module]:
        """Backbone and head, and the teacher's."""
        online = nn.ModuleList([self.backbone, self.head])
        return online, nn.ModuleList([self.teacher_backbone, self.teacher_head])

    @property
    def exported(self) -> nn.Module:
        """The teacher, which the paper evaluates: it is the better of the two (section 5.2)."""
        return self.teacher_backbone.network
