"""Weak localization: classes or findings from a map of evidence, which then tells where they are. No box is learnt."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from sslmed.config import UsageError
from sslmed.heads.head import Head, HeadConfig, Kind, Maps, full
from sslmed.models.backbones import Backbone
from sslmed.models.pyramids import ChannelNorm, OneMap, enlarged

FINER = 4.0  # pixels, the stride of the map that is looked through
HEATED = 4  # images whose gradients are held at once
NOTHING = frozenset({"0", "no", "none", "normal", "negative", "clear", "healthy", "no finding", "nothing"})


class WeakLocalizationConfig(HeadConfig):
    """The knobs of weak localization.

    Attributes:
        stride: of the backbone's map that evidence is read from, pixels; the nearest that it has. A finer map tells
            places better apart, a coarser one sees more around each.
        width: channels of the layer between that map and the evidence.
        sharpness: how near pooling is to the largest evidence of an image (r of ``pooled``); near 0 is the mean.
        share: of the range of an image's heat from which on a place belongs to a box.
        nothing: the class that means that there is nothing to box. By default the one that goes by a usual name for
            that, such as 0, normal or clear; findings need none.
    """

    name: Literal["weak_localization"] = "weak_localization"
    stride: Annotated[int, Field(ge=2, le=64)] = 8
    width: Annotated[int, Field(ge=8, le=1024)] = 128
    sharpness: Annotated[float, Field(gt=0, le=100)] = 10.0
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    nothing: str | int | None = None


class WeakLocalization(Head):
    """A classifier whose last map is the evidence for each class at each place, pooled by log-sum-exp.

    As in ChestX-ray8 (Wang et al., arXiv 1705.02315, section 4.1), for findings are small. Boxes come from a
    class-activation map of its logits, ``heat``.

    Attributes:
        located: numbers of the classes that boxes are laid around.
    """

    Config = WeakLocalizationConfig
    config: WeakLocalizationConfig
    head: "_Evidence"
    kinds = ("class", "findings")
    needs = "pyramid"
    locates = True

    def __init__(self, config: WeakLocalizationConfig, backbone: Backbone, classes: int, kind: Kind = "class") -> None:
        super().__init__(config, backbone, classes, kind)
        self.head = _Evidence(backbone, classes, config.stride, config.width)
        self.located: tuple[int, ...] = tuple(range(classes))

    def named(self, classes: Sequence[str]) -> None:
        nothing = self.config.nothing if self.config.nothing is None else str(self.config.nothing)
        usual = [name for name in classes if name.strip().lower() in NOTHING]
        if self.kind == "findings":
            if nothing is not None:
                raise UsageError(f"head.nothing is {nothing!r}, but findings need no such class; remove it")
        elif nothing is None and len(usual) == 1:
            nothing = usual[0]
        elif nothing not in classes:
            given = "is missing" if nothing is None else f"is {nothing!r}"
            raise UsageError(
                f"head.nothing {given}: which class means that there is nothing to box? Allowed: {', '.join(classes)}"
            )
        self.located = tuple(number for number, name in enumerate(classes) if name != nothing)

    @property
    def without_gradient(self) -> frozenset[str]:
        """Also the backbone's behind the map that is read."""
        behind = self.backbone.behind(self.head.map.number)
        return super().without_gradient | {f"backbone.network.{name}" for name in behind}

    def evidence(self, features: Maps) -> torch.Tensor:
        """(N, classes, h, w), at least fp32; of a class that means nothing it is 0.

        Else what speaks for nothing would be learnt instead of what speaks for something, and could be anywhere.
        """
        found = full(self.head(features[1:]))
        counted = [float(number in self.located) for number in range(self.classes)]
        return found * found.new_tensor(counted)[:, None, None]

    def logits(self, features: Maps) -> torch.Tensor:
        return pooled(self.evidence(features), self.config.sharpness)

    def loss(self, features: Maps, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of classes; binary cross-entropy of findings, of which -1 counts for nothing."""
        logits = self.logits(features)
        if self.kind == "class":
            return F.cross_entropy(logits, target)
        known = target >= 0
        goal = target.clamp_min(0).to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
        return (each * known).sum() / known.sum().clamp_min(1)

    def predict(self, features: Maps) -> torch.Tensor:
        logits = self.logits(features) / self.temperature
        return logits.softmax(dim=1) if self.kind == "class" else logits.sigmoid()

    def heat(self, images: torch.Tensor) -> torch.Tensor:
        """Which places of images (N, C, H, W) speak for each class: (N, classes, H, W), at least 0.

        A finer map of the backbone times the gradient of a logit with respect to it, summed over channels
        (HiResCAM: Draelos & Carin, arXiv 2011.08891), averaged over 3 x 3 cells, enlarged. The evidence itself would
        not do: a cell of it may come to answer for what lies anywhere in its sight, and be off by more than a finding
        is wide. Gradients and modes are left as they were.
        """
        return torch.cat([self._heat(few) for few in images.split(HEATED)])

    def _heat(self, images: torch.Tensor) -> torch.Tensor:
        number = self.head.finer
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            given = images.clone().requires_grad_()
            maps = self.backbone.maps(given)
            logits = self.logits([given, *maps])
            planes = [torch.zeros_like(maps[number][:, 0])] * self.classes
            for label in self.located:
                (gradient,) = torch.autograd.grad(logits[:, label].sum(), maps[number], retain_graph=True)
                planes[label] = F.relu((gradient * maps[number]).sum(dim=1)).detach()
        heat = F.avg_pool2d(torch.stack(planes, dim=1), 3, stride=1, padding=1, count_include_pad=False)
        return enlarged(heat.detach(), self.backbone.levels[number].stride, images.shape[-2:])

    def metrics(self) -> tuple[str, ...]:
        return "auroc", "average_precision", "balanced_accuracy", "ece", "brier"


class _Evidence(nn.Module):
    """From one of a backbone's maps to a map a class."""

    def __init__(self, backbone: Backbone, classes: int, stride: float, width: int) -> None:
        super().__init__()
        self.map = OneMap(backbone.levels, stride)
        strides = [level.stride for level in backbone.levels[: self.map.number + 1]]
        self.finer = min(range(len(strides)), key=lambda number: abs(math.log(strides[number] / FINER)))
        self.before = nn.Sequential(nn.Conv2d(self.map.level.channels, width, 1), ChannelNorm(width), nn.ReLU())
        self.classifier = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, maps: Maps) -> torch.Tensor:
        found = self.before(self.map(maps))
        with torch.autocast(found.device.type, enabled=False):
            evidence: torch.Tensor = self.classifier(found.to(self.classifier.weight.dtype))
        return evidence


def pooled(evidence: torch.Tensor, sharpness: float) -> torch.Tensor:
    """(N, K) of (N, K, h, w): (1 / r) log(mean over places of exp(r e)), between the mean and the largest.

    Pinheiro & Collobert, arXiv 1411.6228, equation 6.
    """
    places = evidence.shape[-2] * evidence.shape[-1]
    return (torch.logsumexp(sharpness * evidence.flatten(2), dim=-1) - math.log(places)) / sharpness
