"""timm backbones: built from a seed, pooled features or maps out. The one place that imports timm."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

import timm
import torch
from pydantic import Field
from timm.layers.norm_act import BatchNormAct2d as BatchNormAct2d  # for sync_batchnorm
from timm.layers.norm_act import SyncBatchNormAct as SyncBatchNormAct
from timm.layers.patch_embed import PatchEmbed as PatchEmbed  # for token_encoder
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva as Eva
from timm.models.vision_transformer import Block as Block  # for decoders
from timm.models.vision_transformer import VisionTransformer as VisionTransformer
from torch import nn

from sslmed.config import Config, MissingInputError, UsageError
from sslmed.image_size import ImageSize, in_words, sides
from sslmed.keyed_rng import key
from sslmed.models.layer_order import layer_numbers
from sslmed.models.recomputation import note_statistics_once


class BackboneConfig(Config):
    """Which timm network.

    Attributes:
        name: a timm model name, such as ``resnet18``.
        in_chans: input channels; 1 for greyscale, 3 for colour.
        init: where the weights start: ``random``, ``imagenet`` (timm's own for that model), or a run, an artifact or a
            weight file. In a card it says only of what kind that was: ``artifact`` or ``file``.
        drop_path: stochastic depth rate.
        patch: side of a transformer's patches, pixels; timm's own for that model by default.
        pool: how a transformer's tokens become one feature vector, the class token or their mean; timm's own for that
            model by default.
    """

    name: str = "resnet18"
    in_chans: Annotated[int, Field(ge=1, le=64)] = 1
    init: Annotated[str, Field(min_length=1)] = "random"
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patch: Annotated[int, Field(ge=1, le=128)] | None = None
    pool: Literal["token", "avg"] | None = None


class Level(NamedTuple):
    """One map of a pyramid: its channels, and how many pixels of the input one of its cells is wide."""

    channels: int
    stride: float


class Backbone(nn.Module):
    """A timm network without its classifier. ``network`` carries timm's own tensor names, which are what gets saved.

    ``pretrained`` says that its weights mean something, so that a method must not draw them anew.
    """

    def __init__(self, network: nn.Module, pretrained: bool = False) -> None:
        super().__init__()
        self.network = network
        self.pretrained = pretrained
        self.num_features = _pooled_width(network)
        self._frozen: tuple[str, ...] = ()  # modules of the network that stay in evaluation mode

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (N, num_features) of images (N, C, H, W)."""
        features: torch.Tensor = self.network(images)
        return features

    @property
    def levels(self) -> tuple[Level, ...]:
        """What ``maps`` gives, fine to coarse: every stage of a hierarchical network, one level of a plain ViT.

        Raises:
            UsageError: timm has no maps of this network.
        """
        return tuple(_stages(self.network))

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Maps (N, channels, H / stride, W / stride) of images (N, C, H, W), one a level, fine to coarse.

        Where a stride does not divide a side, the network's padding decides whether that is rounded up or down. A
        plain ViT gives the patches of its last block, normalised. The final norm or last convolution of other networks
        is left out: theirs are the stages as they come.

        Raises:
            UsageError: timm has no maps of this network.
        """
        stages, network = _stages(self.network), cast(Any, self.network)
        plain = len(stages) == 1  # not features_only: its tensors have other names than those of a checkpoint
        found: list[torch.Tensor] = network.forward_intermediates(
            images, indices=list(stages.values()), norm=plain, output_fmt="NCHW", intermediates_only=True
        )
        if plain and hasattr(network, "fc_norm"):  # the last norm where tokens are averaged; norm then does nothing
            found = [network.fc_norm(each.movedim(1, -1)).movedim(-1, 1) for each in found]
        return found

    def behind(self, level: int) -> frozenset[str]:
        """Names of the parameters that the map of a level, counted from the finest, does not depend on.

        All names where timm ends a level at a part without parameters, such as the stem of a ResNet.
        """
        stages = [*_stages(self.network).values()]
        names = [name for name, _ in self.network.named_parameters()]
        if len(stages) == 1:
            return frozenset()
        last = f"{cast(Any, self.network).feature_info[stages[level]]['module']}."
        end = max((at for at, name in enumerate(names) if name.startswith(last)), default=-1)
        return frozenset(names[end + 1 :])  # timm registers parts in the order in which they compute

    def early_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Maps of the first two stages, or of a plain ViT's first and third block; nothing behind is computed.

        Raises:
            UsageError: timm has no maps of this network.
        """
        stages, network = list(_stages(self.network).values()), cast(Any, self.network)
        chosen = stages[:2] if len(stages) > 1 else [0, min(2, stages[0])]
        found: list[torch.Tensor] = network.forward_intermediates(
            images, indices=chosen, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        return found

    def layers(self) -> tuple[dict[str, int], int]:
        """The layer of each of the network's parameters, counted from the input, and the depth (``layer_numbers``)."""
        return layer_numbers(self.network)

    def freeze(self, count: int | Literal["all"]) -> None:
        """Stop training the first ``count`` layers, and keep their BatchNorm and dropout in evaluation mode from now.

        Args:
            count: at most the depth, which leaves the final norm; ``all`` is the whole network.

        Raises:
            UsageError: there are not so many, or timm does not say which come first.
        """
        number, depth = ({}, 0) if count == "all" else self.layers()
        if count != "all" and not 0 <= count <= depth:
            raise UsageError(f"{count} layers cannot be frozen: this network has {depth}; give 0 to {depth}, or all")
        parameters = dict(self.network.named_parameters())
        frozen = {name for name in parameters if count == "all" or number[name] < count}
        for name in frozen:
            parameters[name].requires_grad_(False)
        self._frozen = tuple(_wholly_in(self.network, frozen))
        self.train(self.training)

    def checkpoint_gradients(self) -> None:
        """From now on keep for the backward pass only what enters each block, and compute the rest once more then.

        It costs about a third more time; what it saves `benchmarks/memory.py` shows. It is timm's: networks differ in
        what is a block, and ``maps`` checkpoints where ``forward`` does. Gradients stay the same to the bit, dropout
        and stochastic depth are drawn the same again, and BatchNorm's statistics count a batch once.

        Raises:
            UsageError: timm cannot do this with the network.
        """
        switch = getattr(self.network, "set_grad_checkpointing", None)
        try:
            if switch is None:
                raise AssertionError
            switch(True)
        except AssertionError as error:  # what timm raises too
            raise UsageError(
                f"timm cannot checkpoint the gradients of {in_timm(self.network)}; take another backbone.name, or set "
                "train.checkpoint_gradients=false and raise train.accumulate or lower train.batch_size"
            ) from error
        note_statistics_once(self.network)

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but what is frozen."""
        super().train(mode)
        for name in self._frozen:
            self.network.get_submodule(name).eval()
        return self


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


def published(config: BackboneConfig, size: ImageSize) -> tuple[str, dict[str, torch.Tensor]]:
    """timm's own pretrained weights, from its cache or the network: their name there, and their tensors.

    They have the channels and the classifier that they were published with; timm has fitted positions and patches to
    this input.

    Raises:
        MissingInputError: timm has no weights for this model, or they cannot be had from here.
    """
    options = {"patch_size": config.patch} if config.patch else {}
    try:
        with torch.random.fork_rng(devices=[]):
            network, _ = _sized(config.name, size, options, pretrained=True)
    except Exception as error:  # whatever the cache, the network and timm's loaders may raise
        reason = str(error).splitlines()[0] if str(error) else ""
        raise MissingInputError(
            f"timm's pretrained weights for {config.name} cannot be had: {type(error).__name__}: {reason[:200]}\n"
            "Fetch them on a machine with network, and give the file: backbone.init=FILE; or backbone.init=random"
        ) from error
    tag = network.pretrained_cfg.get("tag")  # type: ignore[union-attr, operator]
    architecture = config.name.partition(".")[0]
    return f"timm's {architecture}.{tag}" if tag else f"timm's {architecture}", network.state_dict()


def from_folder(folder: Path) -> nn.Module:
    """The network of a folder in the Hugging Face layout, made and filled by timm alone."""
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True)
    return network.eval()


def in_timm(network: nn.Module) -> str:
    """What timm calls the network."""
    return str(getattr(network, "pretrained_cfg", {}).get("architecture", type(network).__name__))


def resample_positions(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1, prefix + old grid, D) for the ``new`` grid: bicubic, antialiased, prefix tokens kept."""
    prefix = table.shape[1] - old[0] * old[1]
    resampled: torch.Tensor = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)
    return resampled


def resample_patches(weight: torch.Tensor, sides: tuple[int, int]) -> torch.Tensor:
    """A patch embedding (D, C, h, w) for patches of other sides, pixels (FlexiViT, arXiv 2212.08013, section 3.4)."""
    resampled: torch.Tensor = resample_patch_embed(weight, list(sides))
    return resampled


def _create(config: BackboneConfig, size: ImageSize) -> tuple[nn.Module, dict[str, Any]]:
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=3)
        listed = "`python -c 'import sslmed.models, timm; print(timm.list_models())'`"
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; {listed}"
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


def _sized(
    name: str, size: ImageSize, options: dict[str, Any], pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    try:  # ViTs and Swins are built for one input size
        named = options | {"img_size": size}
        return timm.create_model(name, pretrained=pretrained, **named), named
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=pretrained, **options), options


def _stages(network: Any) -> dict[Level, int]:
    """The levels that timm's ``forward_intermediates`` gives, fine to coarse, and its number for the last of each."""
    if not hasattr(network, "forward_intermediates") or not getattr(network, "feature_info", None):
        raise UsageError(
            f"timm gives no maps of {type(network).__name__} (it has no forward_intermediates), only pooled features; "
            "take another backbone.name, such as resnet18, convnext_atto, swin_tiny_patch4_window7_224 or "
            "vit_tiny_patch16_224"
        )
    last = {each["reduction"]: (index, each["num_chs"]) for index, each in enumerate(network.feature_info)}
    return {Level(channels, stride): index for stride, (index, channels) in sorted(last.items())}


def _wholly_in(network: nn.Module, frozen: set[str]) -> Iterator[str]:
    """Names of the modules that have parameters, all of them ``frozen``."""
    for name, module in network.named_modules():
        own = [f"{name}.{each}" if name else each for each, _ in module.named_parameters()]
        if own and frozen.issuperset(own):
            yield name


def _pooled_width(network: nn.Module) -> int:
    # num_features is the width before an optional head (MobileNetV3's and others' have a wider pooled output)
    return int(getattr(network, "head_hidden_size", None) or network.num_features)  # type: ignore[arg-type]
