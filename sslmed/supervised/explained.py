"""Why a model calls an image what it does: Grad-CAM, laid over the image."""

import numpy as np

from sslmed.data.input import network_input, to_image
from sslmed.data.intensity import Intensity
from sslmed.data.views import Pixels
from sslmed.evaluation.explain import heat_maps, overlay_heat
from sslmed.supervised.answered import unit
from sslmed.supervised.model import Model


def heat_on(model: Model, pixels: Pixels, intensity: Intensity, label: int) -> Pixels:
    """Where an image shows what makes the logit of a class or finding large, as RGB (H, W, 3) uint8."""
    applied = model.applied
    head = applied.head
    image = network_input(pixels, intensity, applied.policy, applied.size, applied.channels)[None]
    device = next(head.parameters()).device
    heat = heat_maps(head.backbone, lambda features: head.logits(features)[:, label], image.to(device))
    placed = to_image(heat.cpu(), pixels.shape[:2], applied.size)
    return overlay_heat(unit(pixels, intensity, model.card.slices), np.asarray(placed[0]))
