"""Pretext tasks. A new one is a file here and a line in METHODS."""

from sslmed import torchvision_ops

torchvision_ops.mend()

from sslmed.methods.byol import BYOL
from sslmed.methods.mae import MAE
from sslmed.methods.method import Method
from sslmed.methods.rotation import Rotation
from sslmed.methods.simclr import SimCLR

METHODS: dict[str, type[Method]] = {"simclr": SimCLR, "byol": BYOL, "rotation": Rotation, "mae": MAE}
