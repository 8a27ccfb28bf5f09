"""The order of training: global batches, each of rows of one source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from training.common.keyed import keyed_bits

_ROW_ORDER, _BATCH_ORDER = 11, 12


class RowKey(NamedTuple):
    """Names a row at a point of the training; draws for the row are keyed by it."""

    epoch: int
    source: int
    row: int


class GlobalBatchSampler(Sampler[list[RowKey]]):
    """Yields the rows of each global batch, the same on every process.

    An epoch visits every row once. Each source's rows are shuffled and cut into as few batches of at most
    ``global_batch_size`` as hold them, equal in size to within one row (a rest of a few rows would have few in-batch
    negatives); the batches of all sources are then shuffled together, so that a source turns up in proportion to its
    size until all are exhausted. Both orders depend on seed and epoch only: all processes agree on every batch without
    talking. Which process encodes which texts of it is decided in :mod:`training.models.layout`.

    Args:
        rows_per_source: Number of training rows of each source.
        global_batch_size: Rows of a batch, over all processes, at most.
        seed: Seed of both orders.

    Raises:
        ValueError: If there are no rows.

    Example:
        >>> sampler = GlobalBatchSampler([5, 2], global_batch_size=3)
        >>> sorted(len(batch) for batch in sampler)
        [2, 2, 3]
    """

    def __init__(self, rows_per_source: Sequence[int], global_batch_size: int, seed: int = 0) -> None:
        if not sum(rows_per_source):
            raise ValueError("no source has a training row")
        self.rows_per_source = list(rows_per_source)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.epoch = 0
        self._batches = [
            (source, number, -(-rows // global_batch_size))
            for source, rows in enumerate(self.rows_per_source)
            for number in range(-(-rows // global_batch_size))
        ]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Global batches of an epoch, the same in every epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[RowKey]]:
        orders = [
            np.argsort(keyed_bits(self.seed, _ROW_ORDER, self.epoch, source, np.arange(rows)), kind="stable")
            for source, rows in enumerate(self.rows_per_source)
        ]
        draws = keyed_bits(self.seed, _BATCH_ORDER, self.epoch, np.arange(len(self._batches)))
        for index in np.argsort(draws, kind="stable"):
            source, number, count = self._batches[index]
            rows = self.rows_per_source[source]
            chosen = orders[source][number * rows // count : (number + 1) * rows // count]
            yield [RowKey(self.epoch, source, int(row)) for row in chosen]
