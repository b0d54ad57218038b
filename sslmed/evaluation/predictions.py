"""Test predictions kept beside a run, so that fine-tuned models can be compared patient by patient afterwards."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.durable import write_atomically
from sslmed.evaluation import metrics, protocol

NAME = "test_predictions.csv"
_FIXED = ("row", "patient")
_TARGET, _FINDING, _PROBABILITY, _CALLED = "target", "target:", "probability:", "called:"
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
        thresholds: (K,), or (N, K), as for a metric, or None. The file keeps what they decide, not themselves.
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

    @property
    def called(self) -> npt.NDArray[np.bool_]:
        """(N, K): which classes or findings are called."""
        return np.stack(
            [
                np.isfinite(metrics.one_versus_rest(self.target, self.scores, label, self.thresholds).thresholds[:, 0])
                for label in range(len(self.classes))
            ],
            axis=1,
        )

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
            names = [f"{what}{name}" for what in (_PROBABILITY, _CALLED) for name in self.classes]
            writer.writerow([*_FIXED, *truths, *names])
            columns = zip(self.row, self.patient, self.target, self.scores, self.called, strict=True)
            for row, patient, target, scores, called in columns:
                truth = [_WORDS[int(value)] for value in target] if findings else [self.classes[target]]
                decided = (int(each) for each in called)
                writer.writerow([row, patient.decode(), *truth, *(f"{score:.9g}" for score in scores), *decided])


def read(run: Path) -> Predictions:
    """The test predictions of a fine-tuning run, decided as it decided.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    try:
        with (run / NAME).open(newline="", encoding="utf-8") as file:
            return _parse(csv.reader(file))
    except OSError as error:
        raise DataError(f"{run} holds no {NAME}; is it a finished fine-tuning run?") from error
    except (ValueError, IndexError, KeyError, csv.Error) as error:
        raise DataError(f"{run / NAME} is damaged ({error}); fine-tune again") from error


def compare(
    arms: Mapping[str, Sequence[Path | Predictions]], reference: str, replicates: int = 1000
) -> list[protocol.Estimate]:
    """Every metric of every arm, one run a draw, with intervals and the paired difference to ``reference``.

    Args:
        arms: Of each arm its runs, as folders or as what was read from them.
        reference: The arm that the others are compared with.
        replicates: Of the patient bootstrap.

    Raises:
        DataError: the runs were not tested on the same images.
    """
    found = {arm: [run if isinstance(run, Predictions) else read(run) for run in runs] for arm, runs in arms.items()}
    first = found[reference][0]
    for predictions in (each for runs in found.values() for each in runs):
        if not predictions.same_test(first):
            raise DataError("the runs were tested on different images; fine-tune them on the same store and target")
    weights = protocol.bootstrap_weights(first.patient, replicates, seed=0)
    scored = {arm: [each.scored for each in runs] for arm, runs in found.items()}
    return protocol.summarise(scored, metrics.measures(first.target), weights, reference=reference)


def _parse(table: Iterable[list[str]]) -> Predictions:
    header, *lines = table
    classes = tuple(name.removeprefix(_PROBABILITY) for name in header if name.startswith(_PROBABILITY))
    truths = [_TARGET] if header[len(_FIXED)] == _TARGET else [f"{_FINDING}{name}" for name in classes]
    names = [f"{what}{name}" for what in (_PROBABILITY, _CALLED) for name in classes]
    if header != [*_FIXED, *truths, *names] or not classes:
        raise ValueError(f"its columns are {', '.join(header)}")
    targets, scores, called = [], [], []
    for line in _of_length(lines, len(header)):
        truth = line[len(_FIXED) : -2 * len(classes)]
        targets.append(classes.index(truth[0]) if truths == [_TARGET] else [_VALUES[value] for value in truth])
        scores.append([float(value) for value in line[-2 * len(classes) : -len(classes)]])
        called.append([_VALUES[value] == 1 for value in line[-len(classes) :]])
    values = np.array(scores, np.float64)
    return Predictions(
        np.array([int(line[0]) for line in lines], np.int64),
        np.array([line[1].encode() for line in lines], "S32"),
        np.array(targets, np.int64),
        values,
        classes,
        np.where(np.array(called, bool), values, np.inf),  # each image's own cut: what it was, is decided again
    )


def _of_length(lines: Iterable[list[str]], length: int) -> Iterator[list[str]]:
    for line in lines:
        if len(line) != length:
            raise ValueError(f"a row of {len(line)} instead of {length} values")
        yield line
