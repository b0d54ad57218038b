"""From a backbone's maps back to an image: what restorative pretext tasks train, and a segmentation may start from."""

import torch

from sslmed.config import UsageError
from sslmed.models.backbones import Backbone, in_timm
from sslmed.models.layout import layout
from sslmed.models.segmenters import PixelDecoder

BEHIND_ONE_MAP = ("attn_pool.", "cls_attn")  # parts of plain transformers that only pool what their last map shows
FLOOR = 1e-12  # of an error, so that its logarithm is finite


def restored(backbone: Backbone, restorer: PixelDecoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What becomes of corrupted images (N, C, H, W), and their features (N, D).

    The features are the mean of the coarsest map, which is a ResNet's own pooled feature.
    """
    maps = backbone.maps(images)
    return restorer(maps, images.shape[-2:]), maps[-1].mean(dim=(2, 3))


def channels_of(backbone: Backbone) -> int:
    """How many channels the backbone's images have.

    Raises:
        UsageError: its first layer does not tell.
    """
    weights = dict(backbone.network.named_parameters())
    for name in layout(backbone.network).inputs:
        if name in weights:
            return int(weights[name].shape[1])
    raise UsageError(
        f"{in_timm(backbone.network)} moves pixels into channels before its first layer, so that no decoder fits it; "
        "take another backbone.name, such as resnet18 or convnext_atto"
    )


def unreached(backbone: Backbone) -> frozenset[str]:
    """Names, as a method has them, of the backbone's parameters that no map depends on: they stay as they were."""
    levels = backbone.levels
    behind = backbone.behind(len(levels) - 1)
    if len(levels) == 1:
        behind |= {name for name, _ in backbone.network.named_parameters() if name.startswith(BEHIND_ONE_MAP)}
    return frozenset(f"backbone.network.{name}" for name in behind)


def untrained(backbone: Backbone, method: str) -> list[str]:
    """A sentence about what ``unreached`` names, for people; none where that is nothing."""
    behind = sorted(name.removeprefix("backbone.network.") for name in unreached(backbone))
    if not behind:
        return []
    return [
        f"note: {method} trains the backbone's maps; {len(behind)} tensors behind them stay as they are "
        f"({', '.join(behind[:2])}{', ...' if len(behind) > 2 else ''}), and pooled features go through them"
    ]


def restoration_error(restored: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared error over pixels, channels and images, in fp32 or better.

    The loss of denoising autoencoders (Vincent et al., ICML 2008), of context restoration (Chen et al., Medical Image
    Analysis 58, 2019) and of Models Genesis (Zhou et al., arXiv 1908.06912): |x - g(f(x~))|^2, x~ corrupted.
    """
    return _errors(restored, images).mean()


@torch.no_grad()
def gain_db(
    restored: torch.Tensor, corrupted: torch.Tensor, images: torch.Tensor, where: torch.Tensor | None = None
) -> torch.Tensor:
    """By how many decibels the restored images are nearer to the true ones than what the network was given.

    That is the gain in PSNR, whatever the peak: 10 log10 of the ratio of mean squared errors over the batch. 0 is what
    giving back the input would have.

    Args:
        where: (N, H, W), the pixels that count; all by default.
    """
    before, after = (_errors(each, images) for each in (corrupted, restored))
    if where is not None:
        counted = where[:, None]
        before, after = before * counted, after * counted
    ratio = before.sum().clamp_min(FLOOR) / after.sum().clamp_min(FLOOR)
    return 10 * ratio.log10()


def _errors(found: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    precision = torch.promote_types(found.dtype, torch.float32)
    return (found.to(precision) - images.to(precision)).square()
