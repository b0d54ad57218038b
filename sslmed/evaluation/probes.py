"""Probes: what frozen features know. A neighbour vote and a linear classifier, nothing of the backbone is trained.

Protocol, published beside every number because probes of different settings are not comparable:

* Features: the backbone's pooled output in eval mode, float32, of the plain view (no augmentation).
* kNN: cosine similarity, k = 20, votes weighted by exp(cos / 0.07) as in DINO (Caron et al. 2021, eval_knn.py; after
  Wu et al. 2018).
* Linear: features standardised with the training images' mean and standard deviation, then L2-regularised logistic
  regression with C = 1 (scikit-learn's lbfgs). C is fixed, not searched: a search would need labels that the budget
  does not have.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sslmed.config import DataError
from sslmed.console import progress

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

K = 20
TEMPERATURE = 0.07
C = 1.0
MAX_ITERATIONS = 1000

# Similarities are computed for this many test images at a time, so that memory grows with the training set alone.
_BLOCK = 512


class _Batch(Protocol):
    @property
    def views(self) -> list[torch.Tensor]: ...


class _Loader(Protocol):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_Batch]: ...


def embed(backbone: torch.nn.Module, loader: _Loader, label: str | None = None) -> npt.NDArray[np.float32]:
    """The features of every image that ``loader`` yields, in its order.

    Args:
        backbone: Maps (N, C, H, W) to (N, D); runs where its parameters are, and is left in the mode in which it came.
        loader: Yields batches whose ``views[0]`` is (N, C, H, W).
        label: Shown with progress; None for silence.

    Returns:
        (N, D).

    Raises:
        DataError: a feature is not finite.
    """
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    batches: Iterable[_Batch] = progress(loader, len(loader), label) if label else loader
    with evaluating(backbone), torch.inference_mode():
        features = [backbone(batch.views[0].to(device)).float().cpu().numpy() for batch in batches]
    if not features:
        raise ValueError("no images to embed")
    whole = np.concatenate(features, dtype=np.float32)
    if not np.isfinite(whole).all():
        broken = int((~np.isfinite(whole)).any(axis=1).sum())
        raise DataError(
            f"the backbone gives features that are not finite for {broken} of {len(whole)} images.\n"
            "Its weights are damaged or its training diverged; take another checkpoint."
        )
    return whole


def knn_scores(
    train_x: Array, train_y: Array, test_x: Array, classes: int, k: int = K, temperature: float = TEMPERATURE
) -> Floats:
    """Class shares of the votes of the ``k`` nearest training images, each weighted by exp(cosine / temperature).

    Args:
        train_x: (N, D).
        train_y: (N,) integers in [0, classes).
        test_x: (M, D).
        k: At least 1; of fewer training images all vote.
        temperature: Above 0; smaller lets the nearest decide.

    Returns:
        (M, classes), rows sum to 1.
    """
    k = min(k, len(train_x))
    bank, queries = _on_the_sphere(train_x), _on_the_sphere(test_x)
    label_of = np.eye(classes)[train_y]
    scores = np.empty((len(queries), classes))
    for start in range(0, len(queries), _BLOCK):
        cosine = queries[start : start + _BLOCK] @ bank.T
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        closeness = np.take_along_axis(cosine, nearest, axis=1)
        # Less the largest, which cancels in the shares and keeps exp finite at any temperature.
        votes = np.exp((closeness - closeness.max(axis=1, keepdims=True)) / temperature)
        scores[start : start + _BLOCK] = np.einsum("mk,mkc->mc", votes, label_of[nearest])
    return np.asarray(scores / scores.sum(axis=1, keepdims=True))


def linear_scores(
    train_x: Array, train_y: Array, test_x: Array, classes: int, c: float = C, max_iterations: int = MAX_ITERATIONS
) -> Floats:
    """Class probabilities of a logistic regression on standardised features.

    A solver that stops at ``max_iterations`` gives what it has: the optimum is unique and late steps change little.

    Args:
        train_x: (N, D).
        train_y: (N,) integers in [0, classes).
        test_x: (M, D).
        c: Inverse strength of the L2 penalty, above 0.

    Returns:
        (M, classes), rows sum to 1; a class without a training image gets probability 0.
    """
    # Imported here: scikit-learn costs half a second that monitors with kNN alone need not pay.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    known = np.unique(train_y)
    scores = np.zeros((len(test_x), classes))
    if len(known) == 1:
        scores[:, known[0]] = 1.0
        return scores
    scaler = StandardScaler().fit(train_x.astype(np.float64))
    classifier = LogisticRegression(C=c, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(scaler.transform(train_x.astype(np.float64)), train_y)
    scores[:, classifier.classes_] = classifier.predict_proba(scaler.transform(test_x.astype(np.float64)))
    return scores


def _on_the_sphere(features: Array) -> Floats:
    length = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(features / np.maximum(length, 1e-12))


@contextmanager
def evaluating(backbone: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own flag again, as parts may be in eval mode on purpose."""
    training = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
