"""Gradient checkpointing: the inside of a block is forgotten, and computed once more in the backward pass."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torch.utils.module_tracker import ModuleTracker

_TRACKER = ModuleTracker()  # knows whether a backward pass is going on


def called(block: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What the block gives."""
    given: torch.Tensor = block(*args, **kwargs)
    return given


def recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The same, but only what enters the block is kept for the backward pass (Chen et al., arXiv 1604.06174).

    Dropout is drawn the same the second time.
    """
    given: torch.Tensor = checkpoint(block, *args, use_reentrant=False, **kwargs)
    return given


def note_statistics_once(module: nn.Module) -> None:
    """Keep the running statistics of every BatchNorm as they are while blocks are computed once more.

    Otherwise a batch would count twice in them, with the square of 1 - momentum, and the counter would be double.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats:
            layer.register_forward_pre_hook(_put_copies)
            layer.register_forward_hook(_put_back, always_call=True)  # torch ends a second pass by an exception


def _put_copies(layer: Any, _: Any) -> None:
    if _TRACKER.is_bw and "_kept" not in layer.__dict__:
        layer._kept = dict(layer._buffers)
        layer._buffers.update({name: buffer.clone() for name, buffer in layer._kept.items()})


def _put_back(layer: Any, *_: Any) -> None:
    layer._buffers.update(layer.__dict__.pop("_kept", {}))
