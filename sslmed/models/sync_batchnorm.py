"""BatchNorm with the statistics of all processes: torch's own on a GPU; one for the CPU, where torch's refuses."""

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from sslmed import distributed
from sslmed.config import UsageError
from sslmed.models.backbones import BatchNormAct2d, SyncBatchNormAct

M = TypeVar("M", bound=nn.Module)


def synchronise(module: M, device_type: str) -> M:
    """Make each BatchNorm in ``module``, or the module itself, normalise by the batches of all processes together.

    The layers stay the same objects and only change their class. So parameters, buffers, hooks, names and modes stay,
    and whoever holds a layer or a parameter, an optimizer or a momentum encoder, goes on holding it. In evaluation mode
    and in a world of one they compute what they did before. Every process must run the same layers in the same order.

    Gradients of parameters are this process's part, as DDP wants them: the mean over processes is the gradient of the
    mean of their losses. The gradient of the input is that of the sum of all processes' losses.

    Call it before compiling the module and before DDP wraps it.

    Args:
        device_type: where the module will run: ``cpu``, or one that ``torch.nn.SyncBatchNorm`` takes, such as ``cuda``.

    Returns:
        The same module.

    Raises:
        UsageError: a layer is some other kind of BatchNorm.
    """
    becomes: dict[type[nn.Module], type[nn.Module]] = dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), CPUSyncBatchNorm if device_type == "cpu" else nn.SyncBatchNorm
    )
    becomes[BatchNormAct2d] = CPUSyncBatchNormAct if device_type == "cpu" else SyncBatchNormAct
    for name, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm) or isinstance(layer, CPUSyncBatchNorm | nn.SyncBatchNorm):
            continue
        if type(layer) not in becomes:
            raise UsageError(
                f"BatchNorm cannot be synchronised over processes: {name or 'the module'} is a {type(layer).__name__}; "
                "allowed: torch's BatchNorm and timm's BatchNormAct2d. Train on one process, or take another backbone"
            )
        changed: Any = layer
        changed.__class__ = becomes[type(layer)]
        changed.process_group = None  # torch's asks for it; none is all processes
    return module


class CPUSyncBatchNorm(_BatchNorm):
    """What ``torch.nn.SyncBatchNorm`` is on a GPU."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (N, C, ...) normalised, in their own precision; N may differ between processes."""
        if self.training and distributed.world_size() > 1:
            return cast(torch.Tensor, self._with_all_processes(inputs))
        alone: torch.Tensor = super().forward(inputs)
        return alone

    def _check_input_dim(self, inputs: torch.Tensor) -> None:
        if inputs.dim() < 2:
            raise ValueError(f"expected inputs (N, C, ...), not of {inputs.dim()} dimensions")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _with_all_processes(self, inputs: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(inputs)
        normalise: Any = _Normalise.apply
        normalised, mean, variance, count = normalise(inputs, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            counter, means, variances = (
                cast(torch.Tensor, each) for each in (self.num_batches_tracked, self.running_mean, self.running_var)
            )
            counter.add_(1)
            share = 1 / int(counter) if self.momentum is None else self.momentum
            means.lerp_(mean.to(means.dtype), share)
            variances.lerp_((variance * count / (count - 1)).to(variances.dtype), share)  # unbiased, as torch's
        return cast(torch.Tensor, normalised)


class CPUSyncBatchNormAct(CPUSyncBatchNorm):
    """The same for timm's BatchNormAct2d, whose dropout and activation are part of the layer."""

    drop: nn.Module
    act: nn.Module

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (N, C, H, W) normalised, then dropped, then activated."""
        activated: torch.Tensor = self.act(self.drop(super().forward(inputs)))
        return activated


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ioffe and Szegedy, arXiv 1502.03167, algorithm 1).

    Mean and variance are those of all processes. It computes in fp32 or better, and keeps what comes in, not what it
    became, for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, ...]:
        x = _wide(inputs)
        ctx.count = inputs.numel() // inputs.shape[1]
        *sums, count = _over_all(torch.cat([_sum(x), x.new_tensor([ctx.count])])).unbind()
        mean = torch.stack(sums) / count
        centred = x - _channels(mean, x)  # before squaring: E[x^2] - E[x]^2 loses digits
        variance = _over_all(_sum(centred.square())) / count
        scale = (variance + eps).rsqrt()
        normalised = centred * _channels(scale if weight is None else scale * weight, x)
        if bias is not None:
            normalised = normalised + _channels(bias, x)
        ctx.count = count
        ctx.save_for_backward(inputs, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised.to(inputs.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, mean, scale = ctx.saved_tensors
        g = _wide(gradient)
        normalised = (_wide(inputs) - _channels(mean, g)) * _channels(scale, g)
        by_bias, by_weight = _sum(g), _sum(g * normalised)
        by_inputs = None
        if ctx.needs_input_grad[0]:
            # everyone's loss depends on this process's inputs through mean and variance
            along_mean, along_scale = _over_all(torch.stack([by_bias, by_weight])) / ctx.count
            by_inputs = g - _channels(along_mean, g) - normalised * _channels(along_scale, g)
            by_inputs = by_inputs * _channels(scale if weight is None else scale * weight, g)
            by_inputs = by_inputs.to(inputs.dtype)
        return (
            by_inputs,
            by_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            by_bias if ctx.needs_input_grad[2] else None,
            None,
        )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Of each channel: (N, C, ...) -> (C,)."""
    return tensor.sum(dim=[0, *range(2, tensor.dim())])


def _channels(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(C,) -> (1, C, 1, ...), to go with ``like`` (N, C, ...)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _over_all(values: torch.Tensor) -> torch.Tensor:
    """The sum over processes."""
    total = values.clone()
    if distributed.world_size() > 1:
        dist.all_reduce(total)
    return total
