"""Which patches are hidden, and images cut into patches and put together again."""

import numpy as np
import torch

from sslmed.config import UsageError
from sslmed.keyed_rng import rng

FLAT = 0.05  # standard deviations of a normalised image; 3 of the 256 grey levels of a radiograph, above JPEG's noise


def keyed_noise(seed: int, epoch: int, ids: torch.Tensor, length: int, purpose: str) -> torch.Tensor:
    """Uniform noise in [0, 1), (N, length) float64 on the CPU: one keyed stream for each of the N ``ids``."""
    rows = [rng(seed, epoch, sample, purpose).random(length) for sample in ids.tolist()]
    return torch.from_numpy(np.stack(rows))


def random_mask(noise: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``keep`` patches of least noise stay (MAE, arXiv 2111.06377, section 3, "Masking").

    Args:
        noise: (N, L).
        keep: from 0 to L.

    Returns:
        Positions of those that stay, (N, keep), and a mask (N, L), true where a patch is hidden.
    """
    keep_ids = noise.argsort(dim=1, stable=True)[:, :keep]
    hidden = torch.ones_like(noise, dtype=torch.bool).scatter_(1, keep_ids, False)
    return keep_ids, hidden


def enlarged(mask: torch.Tensor, units: tuple[int, int], times: tuple[int, int]) -> torch.Tensor:
    """A mask (N, U) of ``units`` rows and columns as one of patches (N, L), ``times`` as many down and across."""
    grid = mask.unflatten(1, units)
    larger: torch.Tensor = grid.repeat_interleave(times[0], dim=1).repeat_interleave(times[1], dim=2)
    return larger.flatten(1)


def foreground_mask(
    noise: torch.Tensor, foreground: torch.Tensor, keep: int, ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``random_mask``, but so that ``ratio`` of the foreground is hidden, as nearly as whole patches allow.

    What is left of the ``keep`` places goes to background. At least one foreground patch is hidden where there is one.

    Args:
        noise: (N, L), below 1.
        foreground: (N, L), true where a patch shows something.
        keep: below L.
    """
    count = foreground.sum(dim=1, keepdim=True)
    wanted = (count * (1 - ratio)).round().long()
    seen = wanted.minimum(count - 1).clamp(max=keep).clamp_min(0)
    seen = seen.maximum(keep - (noise.shape[1] - count))  # background may be too small for the places that are left
    stays = torch.where(foreground, _rank(noise, foreground) < seen, _rank(noise, ~foreground) < keep - seen)
    return random_mask(noise + (~stays), keep)


def foreground_patches(patches: torch.Tensor, channels: int) -> torch.Tensor:
    """Where a patch is not flat: (N, L) from ``patchify``'s (N, L, p·q·channels), in normalised units.

    A patch is foreground when the standard deviation of its pixels is above ``FLAT`` in one of its channels.
    """
    pixels: torch.Tensor = patches.detach().unflatten(2, (-1, channels)).float()
    return pixels.std(dim=2, correction=0).amax(dim=2) > FLAT


def patchify(images: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """Images (N, C, H, W) as patches (N, L, p·q·C), row by row; a patch's values by row, column, channel.

    Raises:
        UsageError: H or W is not a whole number of patches.
    """
    (p, q), (height, width) = patch, images.shape[-2:]
    if height % p or width % q:
        raise UsageError(f"images of {height} x {width} pixels are not made of whole patches of {p} x {q}")
    cut: torch.Tensor = images.unflatten(3, (width // q, q)).unflatten(2, (height // p, p))  # N C h p w q
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> torch.Tensor:
    """The inverse of ``patchify``: (N, L, p·q·C) as images (N, C, H, W); ``grid`` is rows and columns of patches."""
    split: torch.Tensor = patches.unflatten(2, (*patch, -1)).unflatten(1, grid)  # N h w p q C
    return split.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def take_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Each sample's tokens at its own positions: (N, L, D) at (N, K) gives (N, K, D)."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))


def _rank(noise: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The place of each patch by noise among those marked, from 0; others come after them."""
    return (noise + (~among)).argsort(dim=1, stable=True).argsort(dim=1)
