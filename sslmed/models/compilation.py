"""torch.compile for what takes nearly all of a step: backbones, decoders."""

import torch
from torch import nn

from sslmed.config import UsageError
from sslmed.models.backbones import Backbone, Eva, VisionTransformer

VARIANTS = 128  # of one function; the largest transformers have 40 blocks, in training and in evaluation


def compile_parts(module: nn.Module, device_type: str, backend: str = "inductor") -> None:
    """Let torch compile the parts of a method or a head when they are first called, in place: names of tensors stay.

    Compiled are every backbone as it gives pooled features, momentum encoders too; the blocks of a plain vision
    transformer, for its maps and for masked prediction, which opens it; and decoders. Left as they are: projection
    heads and classifiers, which are torch's own modules and little of a step; maps of hierarchical networks; the loss.

    The first step and the first evaluation take a minute or more. Losses agree to about 1e-6 with those that are not
    compiled; dropout and stochastic depth draw other numbers. A batch of another size is compiled once more, for any
    size from then on. With checkpointed gradients a network with BatchNorm is compiled in small pieces only.

    Call it after ``synchronise`` and ``checkpoint_gradients``, and before DDP wraps the module.

    Args:
        device_type: where it will run: ``cpu`` needs a C++ compiler, ``cuda`` Triton.
        backend: one of torch.compile.

    Raises:
        UsageError: torch cannot compile here.
    """
    _try(device_type, backend)
    # torch gives up a function at its 9th variant, but the blocks of a transformer differ in their stochastic depth
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for part in module.modules():
        if isinstance(part, Backbone):
            part.compile(backend=backend)
            if isinstance(part.network, VisionTransformer | Eva):
                for block in part.network.blocks:
                    block.compile(backend=backend)
    for part in module.children():
        if not isinstance(part, Backbone) and not type(part).__module__.startswith("torch."):  # those stay as they are
            part.compile(backend=backend)


def _try(device_type: str, backend: str) -> None:
    try:
        torch.compile(_twice, backend=backend)(torch.ones(8, device=device_type))
    except Exception as error:  # whatever compilers, drivers and torch may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UsageError(
            f"torch cannot compile on this machine for {device_type}: {type(error).__name__}: {reason[:200]}\n"
            "It needs a C++ compiler such as g++, and Triton on a GPU; or set train.compile=false"
        ) from error


def _twice(values: torch.Tensor) -> torch.Tensor:
    return values.sin() * 2
