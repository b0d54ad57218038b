"""Localization: boxes around what is in an image, by an anchor-free detector on the backbone's maps (FCOS)."""

import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from sslmed.distributed import mean, world_size
from sslmed.heads.head import Head, HeadConfig, Kind, Maps, full
from sslmed.models.backbones import Backbone
from sslmed.models.boxes import falling, giou_loss, iou, nms
from sslmed.models.detectors import Detector, Places
from sslmed.models.reducers import Reducer

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (arXiv 1708.02002, section 5.1)
RADIUS = 1.5  # strides around a box's middle in which places teach (FCOS, arXiv 1904.01355v5, "center sampling")
SPAN = 8.0  # strides: half the longer side of the largest box that a level teaches, as in FCOS, where P3's is 64
CANDIDATES = 300  # boxes an image that enter suppression
TAUGHT = 64  # boxes an image that the reducer learns from, beside the true ones
HIT = 0.5  # the least IoU with a true box of what the reducer shall keep


class LocalizationConfig(HeadConfig):
    """The knobs of localization.

    Attributes:
        input: what the network is given of an image: ``whole``, all of it, scaled to ``data.size``; ``tiles``, windows
            of ``data.size`` pixels at the image's own resolution, in training at random places, afterwards all over the
            image. Images must then be at least as large as a window.
        width: channels of the pyramid and of the layers behind it.
        depth: 3x3 convolutions between the pyramid and the answers.
        overlap: of two boxes of a class with a greater IoU the one of the lower score goes.
        detections: boxes an image at most.
        reducer: a second stage that classifies a crop of the finest map at each box, to reduce false positives; the
            score of a box becomes the geometric mean of the detector's and the probability of its class there.
    """

    name: Literal["localization"] = "localization"
    input: Literal["whole", "tiles"] = "whole"
    width: Annotated[int, Field(ge=8, le=512)] = 96
    depth: Annotated[int, Field(ge=0, le=8)] = 2
    overlap: Annotated[float, Field(gt=0, lt=1)] = 0.6
    detections: Annotated[int, Field(ge=1, le=CANDIDATES)] = 100
    reducer: bool = False

    @property
    def tiles(self) -> bool:
        return self.input == "tiles"


class Boxed(NamedTuple):
    """Boxes of N images, D each: (N, D, 4), their scores (N, D) in [0, 1], falling, 0 of none, and classes (N, D)."""

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor


class Localization(Head):
    """FCOS: the sum of a focal loss of classes, a GIoU loss of boxes and a cross-entropy of how central a place is.

    A score is the geometric mean of a place's probability of the class and of being central, as in FCOS's reference.
    """

    Config = LocalizationConfig
    config: LocalizationConfig
    head: "_Detection"
    kinds = ("boxes",)
    needs = "pyramid"

    def __init__(self, config: LocalizationConfig, backbone: Backbone, classes: int, kind: Kind = "boxes") -> None:
        super().__init__(config, backbone, classes, kind)
        self.head = _Detection(backbone, classes, config)
        self.reducing = config.reducer

    def logits(self, features: Maps) -> torch.Tensor:
        """(N, L, classes) of all places."""
        return self._places(features).classes

    def loss(self, features: Maps, target: torch.Tensor) -> torch.Tensor:
        """Of boxes (N, M, 5): left, top, right, bottom in pixels of the input, class; class -1 is no box.

        Sums over a batch are divided by how many places have a box, or by 1 where none has one; of several processes
        by their mean, so that together they have the gradient of one.
        """
        places = _with_numbers(self._places(features))
        taught = [assigned(places.centres, places.strides, each) for each in target]
        box, central = (torch.stack(parts) for parts in zip(*taught, strict=True))
        there = box >= 0
        truth = target.to(places.boxes.dtype).gather(1, box.clamp_min(0)[..., None].expand(-1, -1, 5))
        number = truth[..., 4].long().masked_fill(~there, self.classes)
        goal = F.one_hot(number, self.classes + 1)[..., :-1].to(places.classes.dtype)
        count, weight = _count(there).to(central), mean(central.sum()).clamp_min(1e-6)
        apart = giou_loss(places.boxes[there], truth[there][:, :4])
        inside = F.binary_cross_entropy_with_logits(places.central[there], central[there], reduction="sum")
        loss = (focal_loss(places.classes, goal) + inside) / count + (apart * central[there]).sum() / weight
        return loss + self._second(features, places, target) if self.config.reducer else loss

    def predict(self, features: Maps) -> torch.Tensor:
        """Boxes (N, D, 6): left, top, right, bottom in pixels of the input, score, class; by falling score.

        What is no box has the class -1 and zeros. Scores are calibrated.
        """
        size = features[0].shape[-2:]
        places = self._places(features)
        found = self._detected(places, size)
        if self.reducing:
            found = self._reduced(places, found)
        there = found.scores > 0
        score = found.scores.clamp(1e-6, 1 - 1e-6)
        score = (score.logit() / self.temperature + self.offset).sigmoid()
        # equal scores may come out a rounding apart, for the ends of a tensor are computed otherwise than its bulk
        score = score.sort(dim=1, descending=True).values * there
        boxes = found.boxes * there[..., None]
        kind = torch.where(there, found.classes, -1).to(boxes.dtype)
        return torch.cat([boxes, score[..., None], kind[..., None]], dim=-1)

    @property
    def stride(self) -> int:
        """Of the coarsest map, pixels."""
        return math.ceil(self.head.detector.pyramid.strides[-1])

    def metrics(self) -> tuple[str, ...]:
        return "map50", "map", "froc", "sensitivity_at_1"

    def _places(self, features: Maps) -> Places:
        places: Places = self.head.detector(features[1:])
        return places

    def _detected(self, places: Places, size: torch.Size) -> Boxed:
        """What is left of the places after suppression, within an input of height and width ``size``."""
        across, down = places.centres.unbind(-1)
        within = (across < size[1]) & (down < size[0])  # a map may reach beyond the input
        scores = (places.classes.sigmoid() * places.central.sigmoid()[..., None]).sqrt() * within[:, None]
        best, at = scores.flatten(1).topk(min(CANDIDATES, scores[0].numel()))
        place, kind = at // self.classes, at % self.classes
        boxes = places.boxes.gather(1, place[..., None].expand(-1, -1, 4))
        inside = boxes.clamp_min(0).minimum(boxes.new_tensor([size[1], size[0], size[1], size[0]]))
        # by what is seen of them; of a place beyond the input that may be nothing
        best = best * nms(torch.where((best > 0)[..., None], inside, boxes), best, kind, self.config.overlap)
        best, order = best.topk(min(self.config.detections, best.shape[1]))
        return Boxed(inside.gather(1, order[..., None].expand(-1, -1, 4)), best, kind.gather(1, order))

    def _reduced(self, places: Places, found: Boxed) -> Boxed:
        """The same boxes in their new order."""
        chance = full(self._second_logits(places, found.boxes)).softmax(dim=-1)
        own = chance.gather(-1, found.classes[..., None] + 1)[..., 0]
        scores, order = falling((found.scores * own).sqrt())
        boxes = found.boxes.gather(1, order[..., None].expand(-1, -1, 4))
        return Boxed(boxes, scores, found.classes.gather(1, order))

    def _second(self, features: Maps, places: Places, target: torch.Tensor) -> torch.Tensor:
        """The reducer's loss: cross-entropy of the likeliest boxes and the true ones, 0 being none."""
        with torch.no_grad():
            found = self._detected(places, features[0].shape[-2:])
            boxes = torch.cat([found.boxes[:, :TAUGHT], target[..., :4].to(found.boxes.dtype)], dim=1)
            kind = torch.stack([hit(each, true) for each, true in zip(boxes, target, strict=True)])
        logits = full(self._second_logits(places, boxes))
        total = F.cross_entropy(logits.flatten(0, 1), kind.flatten(), ignore_index=-1, reduction="sum")
        return total / _count(kind >= 0)

    def _second_logits(self, places: Places, boxes: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head.reducer(places.finest, boxes, self.head.detector.pyramid.strides[0])
        return logits


class _Detection(nn.Module):
    """A detector and, where it is asked for, a reducer, which are saved together."""

    def __init__(self, backbone: Backbone, classes: int, config: LocalizationConfig) -> None:
        super().__init__()
        self.detector = Detector(backbone.levels, classes, config.width, config.depth)
        if config.reducer:
            self.reducer = Reducer(config.width, classes)


def assigned(centres: torch.Tensor, strides: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The box that each place teaches: (L,) its number, -1 for none; and how central the place is in it, (L,).

    A box is taught at one level, by half its longer side, up to 8 strides of the level (FCOS goes by the farthest edge
    from a place, which may leave a box to none); there at places within 1.5 strides of its middle, across and down,
    that lie in it. A side shorter than a stride counts as one stride, so that there always is a place. Of several boxes
    the smallest is taken.

        central = sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))        (FCOS, equation 3)

    Here a side counts as two strides at least: of a small box between places none would be central at all.

    Args:
        centres: (L, 2).
        strides: (L,).
        target: (M, 5), class -1 of none.
    """
    box = torch.full_like(strides, -1, dtype=torch.int64)
    central = torch.zeros_like(strides)
    corners = target[:, :4].to(centres.dtype)
    middle, half = (corners[:, :2] + corners[:, 2:]) / 2, (corners[:, 2:] - corners[:, :2]) / 2
    longer = half.amax(dim=1).masked_fill(target[:, 4] < 0, -1)
    levels = strides.unique().tolist()
    for stride in levels:  # one after another, with the boxes of each alone: all at once takes gigabytes
        above = 0 if stride == levels[0] else SPAN / 2 * stride
        below = math.inf if stride == levels[-1] else SPAN * stride
        own = ((above < longer) & (longer <= below)).nonzero()[:, 0]
        if not len(own):
            continue
        at = strides == stride
        found, off = _nearby(centres[at], middle[own], half[own], stride)
        there = found >= 0
        taught = own[found.clamp_min(0)]
        reach = half[taught].clamp_min(stride)
        box[at] = torch.where(there, taught, -1)
        central[at] = ((reach - off).clamp_min(0) / (reach + off)).prod(dim=1).sqrt() * there
    return box, central


def _nearby(
    centres: torch.Tensor, middle: torch.Tensor, half: torch.Tensor, stride: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each place of a level the smallest box that it may teach, -1 for none; and how far off its middle it lies."""
    takes = torch.ones(len(centres), len(middle), dtype=torch.bool, device=centres.device)
    for axis in range(2):
        reach = half[:, axis].clamp_min(stride / 2).clamp_max(RADIUS * stride)
        takes &= (centres[:, axis, None] - middle[:, axis]).abs() <= reach
    smallest, found = torch.where(takes, half.prod(dim=1), torch.inf).min(dim=1)
    off = (centres - middle[found]).abs()
    return torch.where(smallest < torch.inf, found, -1), off


def focal_loss(logits: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """The sum of -a (1 - p)^2 log p, p the probability of what is true; a is 0.25 where there is something, else 0.75.

    Lin et al., arXiv 1708.02002, equation 5. Every class by itself.

    Args:
        logits: of any shape.
        goal: of the same, 0 or 1.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    chance = logits.sigmoid()
    wrong = chance * (1 - goal) + (1 - chance) * goal
    share = ALPHA * goal + (1 - ALPHA) * (1 - goal)
    return (share * wrong**GAMMA * entropy).sum()


def hit(boxes: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """For each of (n, 4) the class + 1 of the true box (M, 5) that it covers best, 0 below an IoU of 0.5.

    -1 of what is no box: padding among the true ones, which has no area.
    """
    real = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    true = target[target[:, 4] >= 0].to(boxes.dtype)
    kind = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    if len(true) and bool(real.any()):
        best, at = iou(boxes[real], true[:, :4]).max(dim=1)
        kind[real] = torch.where(best >= HIT, true[at, 4].long() + 1, 0)
    return kind.masked_fill(~real, -1)


def _with_numbers(places: Places) -> Places:
    """Instead of boxes that are not numbers, which are refused, classes that are not: the loss says so to the guard."""
    wrong = places.boxes.isnan().any(dim=-1, keepdim=True)
    boxes = torch.where(wrong, places.boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), places.boxes)
    return places._replace(boxes=boxes, classes=places.classes.masked_fill(wrong, torch.nan))


def _count(there: torch.Tensor) -> torch.Tensor:
    """How many are there, the mean over processes; as if it were 1 in all where none is."""
    return mean(there.sum().float()).clamp_min(1 / world_size())
