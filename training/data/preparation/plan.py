"""How one source is prepared: options, and the division of the work into tasks.

The division depends only on the source. How many tasks run at once, where they run and how often they are killed does
not change the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.data.manifest import Source
from training.data.published import PublishedFile

# Stop at the first bad row, or write bad rows to a file with the reason.
ON_BAD_ROW = ("error", "quarantine")
# Purpose of a draw, the first key after the seed: draws for different purposes are independent.
CAP, SPLIT, DOCUMENT_INSTRUCTION = 1, 2, 3
# Minimum rows of a shard, where row groups allow. A task's memory depends on its batches and partitions, not on this.
_SHARD_ROWS = 65_536
# Approximate cells of a partition: if no text repeats, as many texts are in memory at once.
_PARTITION_CELLS = 1 << 17
_MOST_PARTITIONS = 1 << 12
_DRAWS_AT_ONCE = 1 << 20

# Files of the work below its folder.
FILES = {
    "tokenizer": "tokenizer.json",  # the Rust tokenizer; its post-processor appends EOS
    # Of a shard: hashes of its texts (rows, 2 + negatives), draws of its queries (rows,), bad rows, the number of rows
    # whose query is their passage, and the folder of its distinct texts.
    "rows": "rows/{:05d}.uint64",
    "draws": "rows/{:05d}.draws.uint64",
    "quarantine": "rows/{:05d}.quarantine.parquet",
    "same": "rows/{:05d}.same",
    "runs": "runs/{:05d}",
    "held_out": "held_out.uint64",  # (n,) draws of the queries held out for validation, ascending
    # Of a partition, in the order of the hashes: hashes (n,), tokens and their number (n,), UTF-8 and its bytes (n,),
    # and numbers of the normal forms (n,).
    **{kind: f"texts/{{:05d}}.{kind}" for kind in ("hashes", "tokens", "lengths", "utf8", "utf8_lengths", "forms")},
    # Of a shard: positions of the texts of its rows (rows, 2 + negatives), by split.
    "train": "positions/{:05d}.train.int32",
    "validation": "positions/{:05d}.validation.int32",
}


def required_negatives(counts: Mapping[str, int], task_type: str, columns: int) -> int:
    """Return how many negatives each row of a source with so many negative columns must have.

    Retrieval also learns from the other rows of a batch: a source without negative columns trains without negatives.
    """
    return 0 if columns == 0 and task_type == "retrieval" else counts[task_type]


@dataclass(frozen=True)
class PreparationOptions:
    """How sources are prepared. All but ``keep_texts`` enter a source's fingerprint."""

    max_length: int = 1024  # tokens of a text, EOS included; longer texts are truncated and still end with EOS
    instructions: bool = True  # before queries (stage 2), or none (stage 1)
    document_instruction_share: float = 0.3  # of the documents of symmetric sources
    validation_share: float = 0.01
    # That a row must have, by task type; see required_negatives.
    num_hard_negatives: tuple[tuple[str, int], ...] = (("retrieval", 7), ("clustering", 9), ("classification", 1))
    seed: int = 0
    on_bad_row: str = "error"  # one of ON_BAD_ROW
    keep_texts: bool = False  # store the texts beside their tokens, for teachers with another tokenizer
    text_forms: bool = False  # store a number for the normal form of each text, for mask_duplicates

    def __post_init__(self) -> None:
        if self.on_bad_row not in ON_BAD_ROW:
            raise UserError(f"on_bad_row cannot be {self.on_bad_row!r}; use one of {', '.join(ON_BAD_ROW)}")
        for name in ("validation_share", "document_instruction_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        counts = [(f"num_hard_negatives_{task_type}", number, 0) for task_type, number in self.num_hard_negatives]
        for name, number, least in [("max_length", self.max_length, 1), ("seed", self.seed, 0), *counts]:
            if number < least:
                raise UserError(f"{name} must be at least {least}, got {number}")


class Shard(NamedTuple):
    """Neighbouring row groups of one file, read by one task."""

    file: int  # index among the source's files
    row_groups: tuple[int, int]  # the first and the one after the last
    first_row: int  # within the source
    first_row_of_file: int
    rows: int


@dataclass(frozen=True)
class PreparationPlan:
    """The work on one source; all its tasks share it."""

    source: Source
    options: PreparationOptions
    folder: Path  # of the work, see FILES
    negatives: int  # negative columns of the widest file
    shards: tuple[Shard, ...]
    partitions: int = 1  # of the distinct texts by their hashes, a power of two
    highest_draw: int | None = None  # rows with at most this draw are under the source's cap; None if all rows are

    @property
    def required_negatives(self) -> int:
        """Negatives that every row must have."""
        return required_negatives(dict(self.options.num_hard_negatives), self.source.task_type, self.negatives)

    @property
    def cells(self) -> int:
        """Texts of all rows under the cap, repeated ones included."""
        rows = sum(shard.rows for shard in self.shards)
        return min(rows, self.source.cap or rows) * (2 + self.negatives)

    def file(self, kind: str, number: int = 0) -> Path:
        """Return a file of a shard or partition, see ``FILES``."""
        return self.folder / FILES[kind].format(number)

    def make_folders(self) -> None:
        """Make the folders that tasks write into."""
        for kind in FILES:
            self.file(kind).parent.mkdir(parents=True, exist_ok=True)


def make_plan(source: Source, folder: Path, options: PreparationOptions) -> PreparationPlan:
    """Divide the work on a source by the footers of its files, which are checked."""
    files = [PublishedFile(path) for path in source.files]
    shards, row = [], 0
    for number, file in enumerate(files):
        start, row_of_file, groups = 0, 0, file.row_group_rows
        while start < len(groups):
            end, rows = start + 1, groups[start]
            while end < len(groups) and rows < _SHARD_ROWS:
                rows += groups[end]
                end += 1
            shards.append(Shard(number, (start, end), row, row_of_file, rows))
            row, row_of_file, start = row + rows, row_of_file + rows, end
    plan = PreparationPlan(source, options, folder, max(len(file.negatives) for file in files), tuple(shards))
    for file in files:
        file.require(plan.required_negatives, source.task_type)
    wanted = -(-plan.cells // _PARTITION_CELLS)
    partitions = min(1 << max(0, wanted - 1).bit_length(), _MOST_PARTITIONS)
    return replace(plan, partitions=partitions, highest_draw=_highest_draw(source, options, row))


def cap_draws(source: Source, options: PreparationOptions, rows: np.ndarray) -> np.ndarray:
    """Return ``(n,)`` 64-bit draws for ``(n,)`` row numbers within the source."""
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
