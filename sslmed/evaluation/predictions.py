"""Test predictions kept beside a run, so that fine-tuned models can be compared patient by patient afterwards."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.durable import write_atomically
from sslmed.evaluation import metrics, protocol

NAME = "test_predictions.csv"
_FIXED = ("row", "patient")
_TARGET, _FINDING, _PROBABILITY = "target", "target:", "probability:"
_VALUES = {"": -1, "0": 0, "1": 1}
_WORDS = {value: word for word, value in _VALUES.items()}


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of N test images, and the truth.

    Attributes:
        row: (N,) in the store.
        patient: (N,) keyed.
        target: (N,) class indices; or (N, K) of 0, 1 and -1 for unknown, findings.
        scores: (N, K) probabilities: of classes they sum to 1, of findings each is its own.
        classes: K names of classes or findings.
        thresholds: (K,) as for a metric, or None. They are not in the file: the run's artifact card has them.
    """

    row: npt.NDArray[np.int64]
    patient: npt.NDArray[np.bytes_]
    target: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    classes: tuple[str, ...]
    thresholds: npt.NDArray[np.float64] | None = None

    @property
    def scored(self) -> metrics.Scored:
        """What is compared with the target."""
        return metrics.Scored(self.scores, self.thresholds)

    def same_test(self, other: "Predictions") -> bool:
        """Whether both are of the same images, in one order, with the same truth."""
        columns = ("row", "patient", "target")  # rows alone could be those of two stores
        equal = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in columns)
        return equal and self.classes == other.classes

    def write(self, run: Path) -> None:
        """Keep them in the run folder."""
        findings = self.target.ndim == 2
        truths = [f"{_FINDING}{name}" for name in self.classes] if findings else [_TARGET]
        with write_atomically(run / NAME) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_FIXED, *truths, *(f"{_PROBABILITY}{name}" for name in self.classes)])
            for row, patient, target, scores in zip(self.row, self.patient, self.target, self.scores, strict=True):
                truth = [_WORDS[int(value)] for value in target] if findings else [self.classes[target]]
                writer.writerow([row, patient.decode(), *truth, *(f"{score:.9g}" for score in scores)])


def read(run: Path, thresholds: npt.NDArray[np.float64] | None = None) -> Predictions:
    """The test predictions of a fine-tuning run.

    Args:
        run: its folder.
        thresholds: (K,) from its card; None when it has none.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    try:
        with (run / NAME).open(newline="", encoding="utf-8") as file:
            return _parse(csv.reader(file), thresholds)
    except OSError as error:
        raise DataError(f"{run} holds no {NAME}; is it a finished fine-tuning run?") from error
    except (ValueError, IndexError, KeyError, csv.Error) as error:
        raise DataError(f"{run / NAME} is damaged ({error}); fine-tune again") from error


def compare(
    arms: Mapping[str, Sequence[Path | Predictions]],
    reference: str,
    replicates: int = 1000,
    *,
    thresholds_of: Callable[[Path], npt.NDArray[np.float64] | None] | None = None,
) -> list[protocol.Estimate]:
    """Every metric of every arm, one run a draw, with intervals and the paired difference to ``reference``.

    Args:
        arms: Of each arm its runs, as folders or as what was read from them.
        reference: The arm that the others are compared with.
        replicates: Of the patient bootstrap.
        thresholds_of: The (K,) thresholds of a run that is given as a folder; without it 0.5 or the largest score.

    Raises:
        DataError: the runs were not tested on the same images.
    """

    def predictions_of(run: Path | Predictions) -> Predictions:
        if isinstance(run, Predictions):
            return run
        return read(run, None if thresholds_of is None else thresholds_of(run))

    found = {arm: [predictions_of(run) for run in runs] for arm, runs in arms.items()}
    first = found[reference][0]
    for predictions in (each for runs in found.values() for each in runs):
        if not predictions.same_test(first):
            raise DataError("the runs were tested on different images; fine-tune them on the same store and target")
    weights = protocol.bootstrap_weights(first.patient, replicates, seed=0)
    scored = {arm: [each.scored for each in runs] for arm, runs in found.items()}
    return protocol.summarise(scored, metrics.measures(first.target), weights, reference=reference)


def _parse(table: Iterable[list[str]], thresholds: npt.NDArray[np.float64] | None) -> Predictions:
    header, *lines = table
    classes = tuple(name.removeprefix(_PROBABILITY) for name in header if name.startswith(_PROBABILITY))
    truths = [_TARGET] if header[len(_FIXED)] == _TARGET else [f"{_FINDING}{name}" for name in classes]
    if header != [*_FIXED, *truths, *(f"{_PROBABILITY}{name}" for name in classes)] or not classes:
        raise ValueError(f"its columns are {', '.join(header)}")
    targets, scores = [], []
    for line in _of_length(lines, len(header)):
        truth = line[len(_FIXED) : -len(classes)]
        targets.append(classes.index(truth[0]) if truths == [_TARGET] else [_VALUES[value] for value in truth])
        scores.append([float(value) for value in line[-len(classes) :]])
    return Predictions(
        np.array([int(line[0]) for line in lines], np.int64),
        np.array([line[1].encode() for line in lines], "S32"),
        np.array(targets, np.int64),
        np.array(scores, np.float64),
        classes,
        thresholds,
    )


def _of_length(lines: Iterable[list[str]], length: int) -> Iterator[list[str]]:
    for line in lines:
        if len(line) != length:
            raise ValueError(f"a row of {len(line)} instead of {length} values")
        yield line
