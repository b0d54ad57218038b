"""Whether the two views of an image find each other."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def twin_accuracy(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The share of rows of ``first`` (N, D) whose nearest row of ``second``, by cosine, is their own.

    1 / N by chance, and 0 when all rows are the same.
    """
    with torch.autocast(first.device.type, enabled=False):  # bf16 cannot tell cosines near 1 apart
        cosine = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    others = cosine - torch.diag_embed(torch.full_like(cosine[0], torch.inf))
    return (cosine.diagonal() > others.amax(dim=1)).float().mean()
