"""timm backbones: built from a seed, pooled features out. The one place that imports timm."""

import difflib
import functools
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import Field
from torch import nn

from sslmed.config import Config, UsageError
from sslmed.keyed_rng import key


class BackboneConfig(Config):
    """Which timm network.

    Attributes:
        name: a timm model name, such as ``resnet18``.
        in_chans: input channels; 1 for greyscale, 3 for colour.
        init: where the weights start.
        drop_path: stochastic depth rate.
    """

    name: str = "resnet18"
    in_chans: Annotated[int, Field(ge=1, le=64)] = 1
    init: Literal["random"] = "random"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Backbone(nn.Module):
    """A timm network without its classifier. ``network`` carries timm's own tensor names, which are what gets saved."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.num_features = _pooled_width(network)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, num_features) of images (N, C, H, W)."""
        features: torch.Tensor = self.network(images)
        return features


def build(config: BackboneConfig, size: int, seed: int) -> Backbone:
    """A backbone with weights drawn from ``seed``, whatever was drawn before; the global random state stays untouched.

    Raises:
        UsageError: timm has no such model, or it takes no such input.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else "; `python -c 'import timm; print(timm.list_models())'`"
        )
        raise UsageError(f"timm has no model named '{config.name}'{hint}")
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "backbone")[0] % 2**63)
        try:
            network = _create(config, size, options)
            with torch.inference_mode():  # says now, not at the first step, that the network takes no such input
                network.eval()(torch.zeros(1, config.in_chans, size, size))
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"timm cannot make {config.name} for {config.in_chans}-channel images of {size} pixels with "
                f"drop_path {config.drop_path}: {reason}"
            ) from error
    return Backbone(network.train())


def _create(config: BackboneConfig, size: int, options: dict[str, Any]) -> nn.Module:
    named = functools.partial(
        timm.create_model, config.name, pretrained=False, in_chans=config.in_chans, num_classes=0, **options
    )
    try:
        return named(img_size=size)  # ViTs and Swins are built for one input size
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return named()


def _pooled_width(network: nn.Module) -> int:
    # num_features is the width before an optional head (MobileNetV3's and others' have a wider pooled output)
    return int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]
