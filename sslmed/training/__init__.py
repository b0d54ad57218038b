"""Fits a Method or a Head with Lightning, survives interruptions, and watches what happens."""

from sslmed import torchvision_ops

torchvision_ops.mend()
