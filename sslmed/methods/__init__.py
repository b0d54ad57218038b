"""Pretext tasks. A new one is a file here and a line in METHODS."""

from sslmed import torchvision_ops

torchvision_ops.mend()

from sslmed.methods.method import Method
from sslmed.methods.simclr import SimCLR

METHODS: dict[str, type[Method]] = {"simclr": SimCLR}
