"""timm backbones: built from a seed, pooled features out. The one place that imports timm."""

import difflib
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import Field
from torch import nn

from sslmed.config import Config, UsageError
from sslmed.image_size import ImageSize, in_words, sides
from sslmed.keyed_rng import key


class BackboneConfig(Config):
    """Which timm network.

    Attributes:
        name: a timm model name, such as ``resnet18``.
        in_chans: input channels; 1 for greyscale, 3 for colour.
        init: where the weights start.
        drop_path: stochastic depth rate.
        patch: side of a transformer's patches, pixels; timm's own for that model by default.
        pool: how a transformer's tokens become one feature vector, the class token or their mean; timm's own for that
            model by default.
    """

    name: str = "resnet18"
    in_chans: Annotated[int, Field(ge=1, le=64)] = 1
    init: Literal["random"] = "random"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patch: Annotated[int, Field(ge=1, le=128)] | None = None
    pool: Literal["token", "avg"] | None = None


class Backbone(nn.Module):
    """A timm network without its classifier. ``network`` carries timm's own tensor names, which are what gets saved.

    ``pretrained`` says that its weights mean something, so that a method must not draw them anew.
    """

    def __init__(self, network: nn.Module, pretrained: bool = False) -> None:
        super().__init__()
        self.network = network
        self.pretrained = pretrained
        self.num_features = _pooled_width(network)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, num_features) of images (N, C, H, W)."""
        features: torch.Tensor = self.network(images)
        return features


def build(config: BackboneConfig, size: ImageSize, seed: int) -> Backbone:
    """A backbone with weights drawn from ``seed``, whatever was drawn before; the global random state stays untouched.

    Args:
        config: ``init`` is not looked at: other weights are loaded into what this returns.
        size: of the input, pixels.

    Raises:
        UsageError: timm has no such model, or it takes no such input.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "backbone")[0] % 2**63)
        network, _ = _create(config, size)
    return Backbone(network.train())


def timm_arguments(config: BackboneConfig, size: ImageSize) -> dict[str, Any]:
    """The keyword arguments of ``timm.create_model`` that make this backbone."""
    with torch.random.fork_rng(devices=[]):
        return _create(config, size)[1]


def _create(config: BackboneConfig, size: ImageSize) -> tuple[nn.Module, dict[str, Any]]:
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        hint = (
            f"; did you mean {' or '.join(near)}?" if near else "; `python -c 'import timm; print(timm.list_models())'`"
        )
        raise UsageError(f"timm has no model named '{config.name}'{hint}")
    options: dict[str, Any] = {"in_chans": config.in_chans, "num_classes": 0}
    knobs = {"drop_path_rate": config.drop_path, "patch_size": config.patch, "global_pool": config.pool}
    options |= {name: value for name, value in knobs.items() if value}
    try:
        network, options = _sized(config.name, size, options)
        with torch.inference_mode():  # says now, not at the first step, that the network takes no such input
            network.eval()(torch.zeros(1, config.in_chans, *sides(size)))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        given = ", ".join(f"{name} {getattr(config, name)}" for name in ("drop_path", "patch", "pool"))
        raise UsageError(
            f"timm cannot make {config.name} for {config.in_chans}-channel images of {in_words(size)} pixels with "
            f"{given}: {reason}"
        ) from error
    return network, options


def _sized(name: str, size: ImageSize, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    try:  # ViTs and Swins are built for one input size
        named = options | {"img_size": size}
        return timm.create_model(name, pretrained=False, **named), named
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=False, **options), options


def _pooled_width(network: nn.Module) -> int:
    # num_features is the width before an optional head (MobileNetV3's and others' have a wider pooled output)
    return int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]
