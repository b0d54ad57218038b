"""KoLeo: a loss that spreads the points of a batch apart."""

import torch

from sslmed import distributed
from sslmed.models.unit_length import unit

LEAST_DISTANCE = 1e-6  # of two points of length 1, which fp32 cannot tell from none; below it nothing is pushed apart


def koleo(features: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """-log of the distance of each row (N, D), normalised, to the nearest other one; mean over rows.

    Sablayrolles et al., arXiv 1806.03198, equation 2, as DINOv2 uses it (arXiv 2304.07193, section 4), but among the
    rows of all processes: DINOv2's reference looks within a process, and so makes the loss depend on their number. In
    fp32 or better. A row that is the same as another, whose logarithm has no end, counts as ``LEAST_DISTANCE``,
    without gradient. A row that has no other counts 0.

    Args:
        features: rows of this process.
        groups: (N,); rows of one number are not pushed apart. By default every row is.
    """
    points = unit(features)
    with torch.autocast(features.device.type, enabled=False):
        everyone, places = distributed.gather(points), torch.arange(len(points), device=points.device)
        near = (points @ everyone.T).detach()
        near[places, places + distributed.rank() * len(points)] = -torch.inf
        if groups is not None:
            near.masked_fill_(groups[:, None] == distributed.gather(groups), -torch.inf)
        closeness, nearest = near.max(dim=1)
        distance = (points - everyone[nearest]).norm(dim=1).clamp_min(LEAST_DISTANCE)
        spread: torch.Tensor = -torch.where(closeness.isfinite(), distance.log(), 0.0).mean()
        return spread
