"""What all tasks of a source's preparation share, and how the work is divided.

The division follows from the source alone. How many tasks run at once, where, and how often they were killed changes
nothing about what is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.common.keyed import keyed_bits, text_key
from training.data.manifest import Source
from training.data.options import PreparationOptions, required_negatives
from training.data.prepared import SPLITS
from training.data.published import PublishedFile

# What a draw is for: the first key after the seed, so that draws for different ends are independent.
CAP, SPLIT, DOCUMENT_INSTRUCTION = 1, 2, 3
# Rows of a shard at least, where row groups allow: a task's memory follows its batches and partitions, not its rows.
_SHARD_ROWS = 65_536
# Cells of a partition about: as many texts are in memory at once where none repeats.
_PARTITION_CELLS = 1 << 17
_MOST_PARTITIONS = 1 << 12
_DRAWS_AT_ONCE = 1 << 20


class Shard(NamedTuple):
    """Neighbouring row groups of one file, read by one task.

    Attributes:
        file: Position of the file among the source's.
        row_groups: First row group and the one after the last.
        first_row: Number of the shard's first row within the source.
        first_row_of_file: Number of the shard's first row within the file.
        rows: Number of rows.
    """

    file: int
    row_groups: tuple[int, int]
    first_row: int
    first_row_of_file: int
    rows: int


@dataclass(frozen=True)
class PreparationPlan:
    """The work on one source.

    Attributes:
        source: What is prepared.
        options: How.
        folder: Folder of the work; the tasks put everything below it.
        negatives: Negative columns of the widest file.
        shards: What is read.
        partitions: Number of partitions of the distinct texts, a power of two.
        highest_draw: Rows whose draw is at most this are under the source's cap; None if all rows are.
    """

    source: Source
    options: PreparationOptions
    folder: Path
    negatives: int
    shards: tuple[Shard, ...]
    partitions: int = 1
    highest_draw: int | None = None

    @property
    def required_negatives(self) -> int:
        """Negatives that every row must have."""
        return required_negatives(dict(self.options.num_hard_negatives), self.source.task_type, self.negatives)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(shard.rows for shard in self.shards)

    @property
    def cells(self) -> int:
        """Texts of all rows, each as often as it occurs."""
        return min(self.rows, self.source.cap or self.rows) * (2 + self.negatives)

    def open(self, file: int) -> PublishedFile:
        """One of the source's files."""
        return PublishedFile(self.source.files[file], self.required_negatives)

    @property
    def tokenizer_file(self) -> Path:
        """The Rust tokenizer as JSON; EOS is appended by its post-processor."""
        return self.folder / "tokenizer.json"

    def rows_file(self, shard: int) -> Path:
        """Hashes of the texts of a shard's rows: ``(rows, 2 + negatives)`` uint64."""
        return self.folder / "rows" / f"{shard:05d}.uint64"

    def draws_file(self, shard: int) -> Path:
        """Draws of the queries of a shard's rows: ``(rows,)`` uint64."""
        return self.folder / "rows" / f"{shard:05d}.draws.uint64"

    @property
    def held_out_file(self) -> Path:
        """Draws of the queries that are held out for validation: ``(n,)`` uint64, in ascending order."""
        return self.folder / "held_out.uint64"

    def positions_file(self, shard: int, split: str) -> Path:
        """Positions of the texts of a shard's rows: ``(rows, 2 + negatives)`` int32."""
        return self.folder / "positions" / f"{shard:05d}.{SPLITS[split]}"

    def quarantine_file(self, shard: int) -> Path:
        """Bad rows of a shard."""
        return self.folder / "rows" / f"{shard:05d}.quarantine.parquet"

    def same_file(self, shard: int) -> Path:
        """Number of a shard's rows whose query is their passage."""
        return self.folder / "rows" / f"{shard:05d}.same"

    def runs(self, shard: int) -> Path:
        """Folder of a shard's distinct texts."""
        return self.folder / "runs" / f"{shard:05d}"

    def texts_file(self, partition: int, kind: str) -> Path:
        """Hashes, lengths or tokens of a partition's texts, or their UTF-8 and its lengths."""
        return self.folder / "texts" / f"{partition:05d}.{kind}"

    def make_folders(self) -> None:
        """Makes the folders in which tasks write."""
        for name in ("rows", "positions", "runs", "texts"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)


def make_plan(source: Source, folder: Path, options: PreparationOptions) -> PreparationPlan:
    """Divides the work on a source, after a look at what its files say of themselves.

    Raises:
        UserError: If a file is missing, damaged, empty, or lacks a column.
    """
    files = [PublishedFile(path) for path in source.files]
    negatives = max(len(file.negatives) for file in files)
    required = required_negatives(dict(options.num_hard_negatives), source.task_type, negatives)
    for file in files:
        file.require(required, source.task_type)
    shards = tuple(_shards([file.row_group_rows for file in files]))
    plan = PreparationPlan(source, options, folder, negatives, shards)
    wanted = -(-plan.cells // _PARTITION_CELLS)
    partitions = min(1 << max(0, wanted - 1).bit_length(), _MOST_PARTITIONS)
    return replace(plan, partitions=partitions, highest_draw=_highest_draw(source, options, plan.rows))


def cap_draws(source: Source, options: PreparationOptions, rows: np.ndarray) -> np.ndarray:
    """``(n,)`` 64-bit draws of the rows of the given numbers within the source."""
    return keyed_bits(options.seed, CAP, text_key(source.name), rows)


def _highest_draw(source: Source, options: PreparationOptions, rows: int) -> int | None:
    """The draw of the last row under the cap, found in blocks: a source may have a hundred million rows."""
    if source.cap is None or rows <= source.cap:
        return None
    lowest = np.zeros(0, dtype=np.uint64)
    for start in range(0, rows, _DRAWS_AT_ONCE):
        draws = cap_draws(source, options, np.arange(start, min(start + _DRAWS_AT_ONCE, rows)))
        lowest = np.concatenate([lowest, draws])
        if len(lowest) > source.cap:
            lowest = np.partition(lowest, source.cap - 1)[: source.cap]
    return int(lowest.max())


def _shards(files: Sequence[Sequence[int]]) -> list[Shard]:
    shards, row = [], 0
    for file, groups in enumerate(files):
        start, first_of_file = 0, 0
        while start < len(groups):
            end, rows = start + 1, groups[start]
            while end < len(groups) and rows < _SHARD_ROWS:
                rows += groups[end]
                end += 1
            shards.append(Shard(file, (start, end), row, first_of_file, rows))
            row, first_of_file, start = row + rows, first_of_file + rows, end
    return shards
