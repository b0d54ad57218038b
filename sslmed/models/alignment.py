"""Where in the image a cell of a network's map looks: not always at the pixels that it would cover as a tile."""

import torch

from sslmed.models.backbones import Backbone

SAMPLES = 4  # images of noise


def lean(backbone: Backbone, level: int, shape: tuple[int, int, int]) -> tuple[float, float]:
    """How far a map's cells look up and left of their places, down and across in pixels (negative: they look further).

    A cell's place is the middle of its tile, (i + 1/2) strides from the edge. Convolutions of stride 2 with an odd
    kernel and symmetric padding look half a pixel of their input up and left of that, which adds up to (stride - 1) / 2
    in a ResNet; patches look straight. So it is measured, with the middle cell: the middle of the squared gradient of
    its values with respect to an image of noise, in evaluation mode. Gradients and modes are left as they were.

    Args:
        level: number of the map.
        shape: channels, height and width of the image, as the network takes it.
    """
    modes = {module: module.training for module in backbone.modules()}
    device = next(backbone.parameters()).device
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, *shape, generator=noise).to(device).requires_grad_()
    backbone.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            found = backbone.maps(images)[level]
            rows, columns = found.shape[-2:]
            (gradient,) = torch.autograd.grad(found[..., rows // 2, columns // 2].square().sum(), images)
    finally:
        for module, training in modes.items():
            module.training = training
    stride = backbone.levels[level].stride
    weight = gradient.square().sum(dim=(0, 1))

    def middle(along: torch.Tensor) -> float:
        pixels = torch.arange(len(along), device=device, dtype=along.dtype) + 0.5
        return float((along * pixels).sum() / along.sum())

    down, across = middle(weight.sum(dim=1)), middle(weight.sum(dim=0))
    return (rows // 2 + 0.5) * stride - down, (columns // 2 + 0.5) * stride - across
