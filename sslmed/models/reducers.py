"""A second look at what a detector has found: crops of its finest map, and a class or nothing for each."""

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 7  # points of a crop, across and down (Fast R-CNN, arXiv 1504.08083, section 2.1)
MARGIN = 1.25  # sides of a crop over those of its box: what lies around tells a lesion from what only looks like one
HIDDEN = 128


class Reducer(nn.Module):
    """Classifies candidate boxes from crops of a map: one of K classes, or nothing, which is number 0.

    Args:
        width: channels of the map.
        classes: K.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.hidden = nn.Linear(width * SIDE**2, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, classes + 1)

    def forward(self, found: torch.Tensor, boxes: torch.Tensor, stride: float) -> torch.Tensor:
        """Logits (N, D, K + 1), at least fp32.

        Args:
            found: (N, width, h, w).
            boxes: (N, D, 4) pixels of the input.
            stride: pixels a cell of the map.
        """
        images, count = boxes.shape[:2]
        crops = F.relu(self.convolution(crop(found, boxes, stride).flatten(0, 1)))
        hidden = F.relu(self.hidden(crops.flatten(1)))
        with torch.autocast(hidden.device.type, enabled=False):
            logits: torch.Tensor = self.classifier(hidden.to(self.classifier.weight.dtype))
        return logits.reshape(images, count, -1)


def crop(found: torch.Tensor, boxes: torch.Tensor, stride: float) -> torch.Tensor:
    """The map (N, C, h, w) at 7 x 7 points of each box (N, D, 4), bilinear: (N, D, C, 7, 7).

    Points are the middles of 7 x 7 equal parts of the box, once its sides are `MARGIN` times as long; beyond the map
    there is zero (He et al., arXiv 1703.06870, section 3, "RoIAlign", with one point a part).
    """
    rows, columns = found.shape[-2:]
    steps = (torch.arange(SIDE, device=boxes.device, dtype=boxes.dtype) + 0.5) / SIDE - 0.5
    middle, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * MARGIN
    points = middle[..., None, :] + steps[:, None] * sides[..., None, :]  # (N, D, 7, 2): each axis by itself
    unit = 2 * points / (stride * points.new_tensor([columns, rows])) - 1  # -1 and 1 are the map's edges
    across, down = torch.broadcast_tensors(unit[..., None, :, 0], unit[..., :, None, 1])
    grid = torch.stack([across, down], dim=-1).flatten(1, 2)
    found = found.to(torch.promote_types(found.dtype, grid.dtype))  # half precision would move points by half a cell
    taken = F.grid_sample(found, grid.to(found.dtype), align_corners=False)  # (N, C, D * 7, 7)
    images, channels = taken.shape[:2]
    return taken.reshape(images, channels, -1, SIDE, SIDE).transpose(1, 2)
