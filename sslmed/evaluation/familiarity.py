"""Does an image look like those that a model was trained on? A warning before its answer is believed.

What is looked at are the mean and the standard deviation over places of channels of the backbone's early maps, at most
256 numbers an image, and their Mahalanobis distance (Lee et al., arXiv 1807.03888, eq. 2, with one class and the early
layers alone). An artifact keeps their mean and covariance, 0.3 MB, and nothing of any one patient.

Not the pooled features that a head uses: training makes them blind to what is no difference between its classes, and
CT slices passed for chest X-rays by them.

It knows the kind of an image, not whether a finding is new: a rare disease on a usual X-ray is no warning here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from sslmed.config import DataError
from sslmed.models.backbones import Backbone

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

CHANNELS = 64  # of each early map that are looked at, evenly spaced
# The limit is this many times the 99th percentile of held-out distances: of a dozen held-out images alone that
# percentile is too low, and twice it let CT slices pass for X-rays where few images had been trained on.
MARGIN = 1.5
_FLOOR = 1e-4  # of the variance of a direction, where a feature's own is 1: float32 knows no less


@dataclass(frozen=True, eq=False)
class Familiarity:
    """What is usual.

    Attributes:
        mean: (D,) of training images.
        covariance: (D, D) of them, shrunk.
        limit: the distance above which an image is unfamiliar.
    """

    mean: Floats
    covariance: Floats
    limit: float

    def distance(self, features: Array) -> npt.NDArray[np.float64]:
        """The squared Mahalanobis distance over D of features (M, D): (M,).

        Usual images have less than 1, as shrinking widens the covariance. It is infinite where a feature is not finite.
        """
        deviation, spread = self._scales
        whitened = _finite(features - self.mean.astype(np.float64)) / deviation @ spread
        distance = np.square(whitened).mean(axis=1)
        return np.where(np.isfinite(features).all(axis=1), distance, np.inf)

    def tensors(self) -> dict[str, torch.Tensor]:
        """To be kept in an artifact."""
        return {
            "mean": torch.from_numpy(self.mean),
            "covariance": torch.from_numpy(self.covariance),
            "limit": torch.tensor(self.limit, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """What ``tensors`` gave.

        Raises:
            DataError: these are others.
        """
        try:
            mean, covariance = (tensors[name].numpy().astype(np.float32) for name in ("mean", "covariance"))
            limit = float(tensors["limit"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise _damaged(str(error)) from error
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise _damaged("shapes do not fit")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and np.isfinite(limit)):
            raise _damaged("values are not finite")
        if (np.diag(covariance) <= 0).any():
            raise _damaged("a variance is not positive")
        return cls(mean, covariance, limit)

    @cached_property
    def _scales(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(D,) and (D, D): features over the first, times the second, are uncorrelated and of variance 1."""
        covariance = self.covariance.astype(np.float64)
        deviation = np.sqrt(np.diag(covariance))
        variance, directions = np.linalg.eigh(covariance / np.outer(deviation, deviation))
        return deviation, directions / np.sqrt(np.maximum(variance, _FLOOR))


def measure(train: Array, held_out: Array) -> Familiarity:
    """What is usual among the features of training images; the limit comes from images that were not trained on.

    Args:
        train: (N, D), N at least 2; fewer than D will do, as the covariance is shrunk (Ledoit & Wolf, 2004).
        held_out: (M, D), M at least 1, of the same kind of images and of other patients.

    Raises:
        ValueError: there are fewer, or one is not finite.
    """
    # Imported here: it costs half a second, and is needed once a run.
    from sklearn.covariance import ledoit_wolf

    if len(train) < 2 or len(held_out) < 1 or not np.isfinite(train).all() or not np.isfinite(held_out).all():
        raise ValueError("finite features of at least 2 training images and 1 held-out image are needed")
    features = train.astype(np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    # A channel that says the same of every training image would turn any other answer into an infinite distance.
    deviation = np.maximum(deviation, 1e-2 * np.median(deviation) + 1e-6)
    shrunk, _ = ledoit_wolf((features - mean) / deviation, assume_centered=True)
    covariance = shrunk * np.outer(deviation, deviation)
    usual = Familiarity(mean.astype(np.float32), covariance.astype(np.float32), np.inf)
    return Familiarity(usual.mean, usual.covariance, MARGIN * float(np.quantile(usual.distance(held_out), 0.99)))


def appearance(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """What is looked at of images (N, C, H, W): (N, D) float32, D at most 256.

    Of each of the ``early_maps``, at most 64 evenly spaced channels: their means and standard deviations over places.
    Put the backbone into evaluation mode before.

    Raises:
        UsageError: timm has no maps of this network.
    """
    parts = []
    for early in backbone.early_maps(images):
        chosen = torch.linspace(0, early.shape[1] - 1, min(CHANNELS, early.shape[1])).round().long()
        places = early[:, chosen.to(early.device)].flatten(2).float()
        parts += [places.mean(dim=2), places.std(dim=2, correction=0)]
    return torch.cat(parts, dim=1)


def _damaged(why: str) -> DataError:
    return DataError(f"what the model keeps about images it knows is damaged: {why}; fine-tune again")


def _finite(values: Array) -> npt.NDArray[np.float64]:
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
