"""Test predictions kept beside a run, so that fine-tuned models can be compared patient by patient afterwards."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.durable import write_atomically
from sslmed.evaluation import protocol

NAME = "test_predictions.csv"
_FIXED = ("row", "patient", "target")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of N test images: store ``row``, keyed ``patient``, ``target`` class index, ``scores`` (N, K) that sum to 1."""

    row: npt.NDArray[np.int64]
    patient: npt.NDArray[np.bytes_]
    target: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    classes: tuple[str, ...]

    def same_test(self, other: "Predictions") -> bool:
        """Whether both are of the same images, in one order, with the same truth."""
        columns = ("row", "patient", "target")  # rows alone could be those of two stores
        equal = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in columns)
        return equal and self.classes == other.classes

    def write(self, run: Path) -> None:
        """Keep them in the run folder."""
        with write_atomically(run / NAME) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_FIXED, *(f"probability:{name}" for name in self.classes)])
            for row, patient, target, scores in zip(self.row, self.patient, self.target, self.scores, strict=True):
                writer.writerow([row, patient.decode(), self.classes[target], *(f"{score:.9g}" for score in scores)])


def read(run: Path) -> Predictions:
    """The test predictions of a fine-tuning run.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    try:
        with (run / NAME).open(newline="", encoding="utf-8") as file:
            return _parse(csv.reader(file))
    except OSError as error:
        raise DataError(f"{run} holds no {NAME}; is it a finished fine-tuning run?") from error
    except (ValueError, IndexError) as error:
        raise DataError(f"{run / NAME} is damaged ({error}); fine-tune again") from error


def _parse(table: Iterable[list[str]]) -> Predictions:
    header, *lines = table
    classes = tuple(name.removeprefix("probability:") for name in header[len(_FIXED) :])
    return Predictions(
        np.array([int(line[0]) for line in lines], np.int64),
        np.array([line[1].encode() for line in lines], "S32"),
        np.array([classes.index(line[2]) for line in lines], np.int64),
        np.array([[float(value) for value in line[len(_FIXED) :]] for line in lines], np.float64),
        classes,
    )


def compare(arms: Mapping[str, Sequence[Path]], reference: str, replicates: int = 1000) -> list[protocol.Estimate]:
    """Every metric of every arm, one run a draw, with intervals and the paired difference to ``reference``.

    Raises:
        DataError: the runs were not tested on the same images.
    """
    read_arms = {arm: [read(run) for run in runs] for arm, runs in arms.items()}
    first = read_arms[reference][0]
    for predictions in (each for each_arm in read_arms.values() for each in each_arm):
        if not predictions.same_test(first):
            raise DataError("the runs were tested on different images; fine-tune them on the same store and target")
    weights = protocol.bootstrap_weights(first.patient, replicates, seed=0)
    scores = {arm: [each.scores for each in runs] for arm, runs in read_arms.items()}
    return protocol.summarise(scores, first.target, weights, reference=reference)
