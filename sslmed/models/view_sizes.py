"""Views of several sizes through one network: what it must be told, and one batch for each size."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from sslmed.config import UsageError
from sslmed.models.backbones import Backbone, Eva, PatchEmbed, VisionTransformer, in_timm


def accept_scale(backbone: Backbone, scale: float) -> float:
    """From now on the backbone takes images of ``scale`` times the sides that it was built for, beside whole ones.

    Convolutional networks do so anyway. A plain vision transformer becomes what timm makes with
    ``dynamic_img_size``: learnt positions are resampled to the image's patches (bicubic, antialiased). Its tensors,
    their names and what it makes of whole images stay as they are, to the bit.

    Returns:
        The scale itself, or for a transformer the nearest one that makes whole patches.

    Raises:
        UsageError: the network takes images of one size alone.
    """
    network = cast(Any, backbone.network)
    if not (isinstance(network, VisionTransformer | Eva) and isinstance(network.patch_embed, PatchEmbed)):
        if getattr(network, "pretrained_cfg", {}).get("fixed_input_size"):
            raise UsageError(_one_size(network, "was built for one"))
        return scale
    rotary = getattr(network, "rope", None)
    if rotary is not None and rotary.get_embed(shape=(1, 1)).shape[-2] != 1:
        raise UsageError(_one_size(network, "keeps rotary positions of one"))
    transformer, embed = cast(Any, network), cast(Any, network.patch_embed)
    transformer.dynamic_img_size = True
    embed.strict_img_size, embed.flatten = False, False
    embed.output_fmt = type(embed.output_fmt)("NHWC")  # rows and columns, which _pos_embed looks at
    parts = math.gcd(*embed.grid_size)
    return max(1, round(scale * parts)) / parts


def of_each_view(network: Callable[[torch.Tensor], torch.Tensor], views: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the network makes of V views (N, C, H, W): (V, N, ...). Neighbours of one size go through it together.

    So BatchNorm sees all views of a size at once, as in the references (facebookresearch/swav, facebookresearch/dino).
    """
    made = []
    for _, alike in itertools.groupby(views, key=lambda view: view.shape):
        same = list(alike)
        made.append(network(torch.cat(same)).unflatten(0, (len(same), -1)))
    return torch.cat(made)


def _one_size(network: Any, why: str) -> str:
    return (
        f"{in_timm(network)} {why} size of images and cannot take smaller views; take a convolutional network or a "
        "plain vision transformer such as vit_tiny_patch16_224, or set method.local_views=0"
    )
