"""Projectors and predictors: linear layers with BatchNorm and ReLU between them."""

import itertools
from collections.abc import Sequence

from torch import nn


def perceptron(
    widths: Sequence[int], *, bias: bool = False, last_bias: bool = False, last_norm: bool = False
) -> nn.Sequential:
    """Linear, BatchNorm, ReLU for each hidden layer, then Linear: (N, first width) to (N, last width).

    Args:
        widths: of the input, the hidden layers and the output.
        bias: of hidden layers; what follows takes their mean away, so that it moves nothing.
        last_bias: of the last layer.
        last_norm: BatchNorm without scale and shift at the end.
    """
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        modules += [nn.Linear(before, after, bias=bias), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    modules.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
    if last_norm:
        modules.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*modules)
