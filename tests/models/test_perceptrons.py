"""Layers, biases and the norm at the end, as asked for."""

import pytest
import torch
from torch import nn

from sslmed.models.perceptrons import perceptron


@pytest.mark.parametrize("widths", [[3, 2], [3, 5, 2], [3, 5, 7, 2]])
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_layers_have_batchnorm_and_relu(widths: list[int], bias: bool) -> None:
    network = perceptron(widths, bias=bias)
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (len(widths) - 2)
    assert [type(part) for part in network] == [*hidden, nn.Linear]
    linear = [part for part in network if isinstance(part, nn.Linear)]
    assert [part.in_features for part in linear] == widths[:-1]
    assert [part.bias is not None for part in linear] == [bias] * (len(widths) - 2) + [False]
    assert network(torch.randn(4, 3)).shape == (4, 2)


def test_the_end_may_have_a_bias_or_a_norm_without_scale_and_shift() -> None:
    assert perceptron([3, 5, 2], last_bias=True)[-1].bias is not None
    network = perceptron([3, 5, 2], last_norm=True)
    assert not list(network[-1].parameters())
    output = network(torch.randn(64, 3))
    torch.testing.assert_close(output.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.var(dim=0, correction=0), torch.ones(2), rtol=0, atol=1e-2)
