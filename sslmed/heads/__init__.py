"""Supervised tasks. A new one is a file here and a line in HEADS."""

from sslmed import torchvision_ops

torchvision_ops.mend()

from sslmed.heads.classification import Classification
from sslmed.heads.head import Head
from sslmed.heads.localization import Localization
from sslmed.heads.segmentation import Segmentation
from sslmed.heads.weak_localization import WeakLocalization

HEADS: dict[str, type[Head]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "localization": Localization,
    "weak_localization": WeakLocalization,
}
