"""Rows of length 1, whose products are cosines."""

import torch
import torch.nn.functional as F


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows (..., D) of length 1, in fp32 or better also under autocast: bf16 cannot tell cosines near 1 apart."""
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
