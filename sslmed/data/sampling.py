"""Which samples a step gets.

The whole training is one finite stream of batches, a function of the seed alone. An interrupted run goes on at batch
k of the same stream, whatever the number of workers; an epoch is a stretch of it, never a restart of the loader.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from sslmed.config import UsageError
from sslmed.keyed_rng import rng

FAR = 2**32  # more epochs than any training has
Rows = np.ndarray[Any, np.dtype[np.int64]]


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, row) pairs of each batch of one training.

    The order of an epoch is a permutation keyed by seed and epoch; what does not fill a step at its end is left out,
    so all steps and all ranks get equal batches. Ranks take slices of the same global batch.

    With strata an epoch is as long, but each stratum is met as often as every other, give or take one: a small one's
    rows come again and again, each as often as the others of its stratum, give or take one; of a large one's some wait
    for another epoch. A row that comes again within an epoch is addressed as of another one, far off, so that its
    views differ.

    Args:
        rows: the store rows to train on.
        batch_size: samples an optimizer step, over all ranks and accumulated batches.
        steps: optimizer steps of the whole training.
        start: batches already done by an earlier, interrupted process.
        strata: (rows,) the number of the stratum of each, such as its class.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        steps: int,
        seed: int,
        *,
        accumulate: int = 1,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        strata: Rows | None = None,
    ) -> None:
        if batch_size % (accumulate * world_size):
            raise UsageError(
                f"train.batch_size is {batch_size}; allowed: multiples of accumulate x processes, "
                f"{accumulate * world_size}"
            )
        self.rows, self.steps, self.seed, self.start, self.rank = rows, steps, seed, start, rank
        self.accumulate = accumulate
        self.micro = batch_size // accumulate
        self.local = self.micro // world_size
        self.batches_per_epoch = steps_per_epoch(len(rows), batch_size) * accumulate
        self.strata: list[Rows] = []
        if strata is not None:
            _, number = np.unique(strata, return_inverse=True)
            self.strata = [rows[number == each] for each in range(number.max() + 1)]

    def __len__(self) -> int:
        return self.steps * self.accumulate  # the whole stream, also when resumed: Lightning counts from its start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order, turns = -1, self.rows, self.rows
        for batch in range(self.start, len(self)):
            if batch // self.batches_per_epoch != epoch:
                epoch = batch // self.batches_per_epoch
                order = self._order(rng(self.seed, epoch, 0, "order"))
                turns = _turns(order) if self.strata else np.zeros(len(order), np.int64)
            first = batch % self.batches_per_epoch * self.micro + self.rank * self.local
            here = slice(first, first + self.local)
            yield [(epoch + int(turn) * FAR, int(row)) for turn, row in zip(turns[here], order[here], strict=True)]

    def _order(self, stream: np.random.Generator) -> Rows:
        if not self.strata:
            return stream.permutation(self.rows)
        share, rest = divmod(self.batches_per_epoch * self.micro, len(self.strata))
        one_more = stream.permutation(len(self.strata)) < rest
        parts = [_again(stream, rows, share + int(more)) for rows, more in zip(self.strata, one_more, strict=True)]
        return stream.permutation(np.concatenate(parts))


def _turns(order: Rows) -> Rows:
    """How often each row has come before in ``order``."""
    by_row = np.argsort(order, kind="stable")
    begins = np.flatnonzero(np.diff(order[by_row], prepend=-1))
    turns = np.empty(len(order), np.int64)
    turns[by_row] = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    return turns


def _again(stream: np.random.Generator, rows: Rows, count: int) -> Rows:
    """``count`` of ``rows``: all of them as often as they go into it, then a draw without replacement."""
    times, rest = divmod(count, len(rows))
    return np.concatenate([np.repeat(rows, times), stream.permutation(rows)[:rest]])


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Optimizer steps in one pass over ``images``.

    Raises:
        UsageError: there are fewer images than one step needs.
    """
    if images < batch_size:
        raise UsageError(
            f"train.batch_size is {batch_size}, but there are {images} training images; "
            + (f"give train.batch_size={images} or less" if images >= 2 else "a batch needs two: ingest more patients")
        )
    return images // batch_size
