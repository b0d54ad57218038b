"""What ``loss`` has seen and ``after_step`` is to apply: queues and centres change with a performed step alone."""

import torch
from torch import nn


class Pending:
    """Tensors of the step at hand, in the order in which they came.

    A step may be made of several batches, each with a ``loss`` of its own, and it may be skipped, which nobody tells:
    then its gradients are gone. So what is found pending while no parameter has a gradient is of a skipped step, and
    is dropped. Between steps there is nothing, so that a checkpoint needs none of it.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def add(self, module: nn.Module, tensor: torch.Tensor) -> None:
        """Keep a tensor, without its gradient, that ``loss`` of ``module`` has made."""
        if all(parameter.grad is None for parameter in module.parameters()):
            self._tensors.clear()
        self._tensors.append(tensor.detach())

    def take(self) -> list[torch.Tensor]:
        """All of them; afterwards there is none."""
        taken, self._tensors = self._tensors, []
        return taken
