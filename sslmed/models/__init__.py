"""Networks without training logic."""

from sslmed import torchvision_ops

torchvision_ops.mend()
