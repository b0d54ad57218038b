"""Pretext tasks. A new one is a file here and a line in METHODS."""

from sslmed import torchvision_ops

torchvision_ops.mend()

from sslmed.methods.method import Method  # noqa: E402
from sslmed.methods.simclr import SimCLR  # noqa: E402

METHODS: dict[str, type[Method]] = {"simclr": SimCLR}
