"""Optimizers, parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from sslmed.config import Config

Parameters = list[dict[str, Any]]
REFERENCE_BATCH = 256  # learning rates of the field are quoted for it (Goyal et al., arXiv 1706.02677)


class OptimConfig(Config):
    """How weights are updated.

    Attributes:
        lr: peak learning rate, before ``lr_rule``.
        lr_rule: how ``lr`` follows the global batch B, over all processes and accumulated parts: ``constant``;
            ``linear``, times B / 256 (Goyal et al., arXiv 1706.02677); ``sqrt``, times sqrt(B / 256) (SimCLR,
            arXiv 2002.05709, appendix B.1).
        weight_decay: for weights with two dimensions or more; biases and norm layers have none.
        final_weight_decay: where half a cosine leads the weight decay after the last step, as in DINO (arXiv
            2104.14294, section 3, "Implementation details"); by default it stays as it is.
        warmup: share of all optimizer steps during which the rate climbs linearly, from 0 at the first
            (as in SimCLR's reference).
        final_lr: where half a cosine leads after the last step, as a share of the peak.
        momentum: of SGD and LARS.
        betas: of AdamW.
        trust: coefficient of LARS; its learning rates are some hundred times those of SGD.
    """

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    lr_rule: Literal["constant", "linear", "sqrt"] = "constant"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    final_weight_decay: Annotated[float, Field(ge=0)] | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    trust: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _decay_begins(self) -> Self:
        if self.final_weight_decay and not self.weight_decay:
            raise ValueError(
                f"final_weight_decay is {self.final_weight_decay} and weight_decay 0, which leaves nothing to decay; "
                "allowed: a weight_decay above 0"
            )
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The peak learning rate for a global batch of ``batch_size`` samples."""
        ratio = batch_size / REFERENCE_BATCH
        return self.lr * {"constant": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.lr_rule]


def decay_groups(modules: Iterable[nn.Module], weight_decay: float) -> Parameters:
    """Two parameter groups: weights of two dimensions or more decay; biases and norm layers do not.

    As in SimCLR's reference (google-research/simclr, model_util.py), which goes by name; shape holds for any network.
    """
    trainable = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(config: OptimConfig, groups: Parameters, batch_size: int) -> torch.optim.Optimizer:
    """The optimizer over ``groups`` at its peak learning rate."""
    lr = config.peak_lr(batch_size)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)
    if config.name == "lars":
        return LARS(groups, lr, config.momentum, config.trust)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, fused=True)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as the joint-embedding papers use it.

    For weights of two dimensions or more, with d = g + wd p:

        q = trust |p| / |d|  (1 if either norm is 0)      mu <- momentum mu + q d      p <- p - lr mu

    Biases and norm layers, of one dimension, are neither decayed nor adapted: d = g and q = 1. The rate comes after
    the momentum, as in the PyTorch references (Barlow Twins, VICReg, MoCo v3); SimCLR's TensorFlow code multiplies it
    in before, which differs while the rate changes.
    """

    def __init__(self, groups: Parameters, lr: float, momentum: float = 0.9, trust: float = 1e-3) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        direction = gradient
        if parameter.ndim > 1:
            direction = gradient.add(parameter, alpha=group["weight_decay"])
            weight, step = parameter.norm(), direction.norm()
            adapted = (weight > 0) & (step > 0)
            direction = direction * torch.where(adapted, group["trust"] * weight / step, torch.ones_like(weight))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
        parameter.sub_(state["momentum_buffer"], alpha=group["lr"])


def scheduled(config: OptimConfig, groups: Parameters, batch_size: int, total_steps: int) -> dict[str, Any]:
    """The optimizer with its schedule, stepped after each performed step, in the form that Lightning asks for.

    A group may have a ``share`` of the rate, and ``begin``: the step at which its own warm-up starts; before, its rate
    is 0. The rate of a ``constant`` group stays at the peak.
    """
    factors = [_factor(config, total_steps, group) for group in groups]
    optimizer = build_optimizer(config, groups, batch_size)
    schedule = _Schedule(optimizer, factors, config, total_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Schedule(torch.optim.lr_scheduler.LambdaLR):
    """The factors on the rates, and the weight decay of the groups that have one."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factors: list[Callable[[int], float]],
        config: OptimConfig,
        total_steps: int,
    ) -> None:
        self._begin, self._end, self._total = config.weight_decay, config.final_weight_decay, total_steps
        super().__init__(optimizer, factors)

    def step(self, epoch: int | None = None) -> None:
        """Move on by an optimizer step."""
        super().step(epoch)
        if self._end is None:
            return
        decay = half_cosine(self._begin, self._end, self.last_epoch, self._total)
        for group in self.optimizer.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = decay


def half_cosine(first: float, last: float, step: int, total: int) -> float:
    """From ``first`` at step 0 to ``last`` at ``total``, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(1.0, step / total))) / 2


def warmup_cosine(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """The factor on the peak rate as a function of performed optimizer steps: from 0 up to 1, then down the cosine."""
    warmup_steps = round(config.warmup * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Scale each gradient by itself so that its norm is at most ``limit``, as DINO's reference does (utils.py).

    The usual clipping takes the norm of all gradients together.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        shares = [(limit / (norm + 1e-6)).clamp(max=1) for norm in torch._foreach_norm(gradients)]
        torch._foreach_mul_(gradients, shares)


def _factor(config: OptimConfig, total_steps: int, group: dict[str, Any]) -> Callable[[int], float]:
    begin, share = group.get("begin", 0), group.get("share", 1.0)
    if group.get("constant"):
        return lambda _: share
    later = warmup_cosine(config, total_steps - begin)
    return lambda step: share * later(step - begin) if step >= begin else 0.0
