"""How one source is prepared: options, and the division of the work into tasks, which depends only on the source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
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
# Minimum rows of a shard, where files allow. A task's memory depends on its batches and partitions, not on this.
_SHARD_ROWS = 65_536
# Shards of one large row group. Each decodes the rows before its own, too, which takes a twentieth of the time of
# reading them: eight make reading 17 % more work, and 5.7 times as fast on eight cores.
_MOST_PARTS = 8
# Approximate cells of a partition: if no text repeats, as many texts are in memory at once.
_PARTITION_CELLS = 1 << 17
_MOST_PARTITIONS = 1 << 12

# Files of the work. Of a partition, in the order of the hashes: "hashes", "tokens" and their "lengths", "utf8" and its
# "utf8_lengths", numbers of the normal "forms". Of a shard: "rows", the hashes of its texts (rows, width), "draws" of
# its queries, its "scores", bad rows ("quarantine"), the number of rows whose query is their passage ("same"), the
# folder of its distinct texts ("runs"), hashes of texts beside those of their document "ids", and by split positions of
# the texts of its rows, and their scores. One "tokenizer"; one "held_out", the draws of the queries held out for
# validation; one "documents", the forms once texts of one document id have the same.


def required_negatives(counts: Mapping[str, int], task_type: str, columns: int) -> int:
    """Return how many negatives each row of a source with so many negative columns must have.

    Retrieval also learns from the other rows of a batch: a source without negative columns trains without negatives.
    """
    return 0 if columns == 0 and task_type == "retrieval" else counts.get(task_type, 0)


def least_negatives(drawn: Mapping[str, int], least: int | None) -> tuple[tuple[str, int], ...]:
    """Return how many negatives a row must have by task type, if so many are drawn: all of them, or ``least``.

    Clustering and classification learn from negatives alone, so a row must have at least one.
    """
    bounds = {name: count if least is None else max(least, int(name != "retrieval")) for name, count in drawn.items()}
    return tuple((name, min(count, bounds[name])) for name, count in drawn.items())


@dataclass(frozen=True)
class PreparationOptions:
    """How sources are prepared. All but ``keep_texts`` enter a source's fingerprint."""

    max_length: int = 1024  # tokens of a text, EOS included; longer texts are truncated and still end with EOS
    instructions: bool = True  # before queries (stage 2), or none (stage 1)
    document_instruction_share: float = 0.3  # of the documents (passages and negatives) of symmetric sources
    validation_share: float = 0.01
    # Negatives that a row must have, by task type; see least_negatives and required_negatives.
    num_hard_negatives: tuple[tuple[str, int], ...] = (("retrieval", 7), ("clustering", 9), ("classification", 1))
    seed: int = 42  # that of TrainingArguments, so that a stage finds what prepare.py made
    on_bad_row: str = "error"  # one of ON_BAD_ROW
    keep_texts: bool = False  # store the texts beside their tokens, for teachers with another tokenizer
    query_prompt: str | None = None  # before queries of sources without an instruction
    document_prompt: str = ""  # before documents of sources without an instruction
    text_forms: bool = False  # store a number for the normal form of each text, for mask_duplicates
    document_scores: bool = False  # store the scores that rows have of their documents, for score distillation

    def __post_init__(self) -> None:
        if self.on_bad_row not in ON_BAD_ROW:
            raise UserError(f"on_bad_row cannot be {self.on_bad_row!r}; use one of {', '.join(ON_BAD_ROW)}")
        values = {**vars(self), **{f"num_hard_negatives_{name}": count for name, count in self.num_hard_negatives}}
        for name, value in values.items():
            least, most = int(name == "max_length"), 1 if name.endswith("share") else math.inf
            if isinstance(value, int | float) and not least <= value <= most:
                raise UserError(f"{name} must be at least {least} and at most {most}, got {value}")


class Shard(NamedTuple):
    """Neighbouring row groups of one file, or a part of them, read by one task."""

    file: int  # index among the source's files
    row_groups: tuple[int, int]  # the first and the one after the last
    first_row: int  # within the source
    first_row_of_file: int
    rows: int
    skipped: int = 0  # rows of the row groups before them


@dataclass(frozen=True)
class PreparationPlan:
    """The work on one source; all its tasks share it."""

    source: Source
    options: PreparationOptions
    folder: Path  # of the work
    negatives: int  # negative columns of the widest file
    required_negatives: int  # that every row must have
    shards: tuple[Shard, ...]
    positives: int = 1  # passage and further positive columns of the file that has most
    has_ids: bool = False  # whether a file has document ids
    has_document_scores: bool = False  # whether a file has scores that are to be stored
    partitions: int = 1  # of the distinct texts by their hashes, a power of two
    highest_draw: int | None = None  # rows with at most this draw are under the source's cap; None if all rows are

    @property
    def prompt(self) -> str | None:
        """What goes before queries for want of an instruction; None if the source has one, or texts stay raw."""
        return self.options.query_prompt if self.options.instructions and self.source.instruction is None else None

    @property
    def document_prompt(self) -> str:
        """What goes before documents that carry no instruction."""
        return "" if self.prompt is None else self.options.document_prompt

    @property
    def width(self) -> int:
        """Texts of a row: query, passage, negatives, further positives."""
        return 1 + self.positives + self.negatives

    @property
    def scores(self) -> int:
        """Scores of a row: one of a graded pair, or those of its documents, in the order of its texts; else none."""
        return 1 if self.source.task_type == "similarity" else (self.width - 1) * self.has_document_scores

    @property
    def keeps_forms(self) -> bool:
        """Whether a number is stored for the form, or the document, of each text."""
        return self.options.text_forms or self.has_ids

    @property
    def cells(self) -> int:
        """Texts of all rows under the cap, repeated ones included."""
        rows = sum(shard.rows for shard in self.shards)
        return min(rows, self.source.cap or rows) * self.width

    def file(self, kind: str, number: int = 0) -> Path:
        """Return a file of the work."""
        return self.folder / f"{kind}-{number:05d}"

    def files(self, kind: str) -> list[Path]:
        """Return the files of a kind of all shards or partitions, in order."""
        return sorted(self.folder.glob(f"{kind}-*"))


def make_plan(source: Source, folder: Path, options: PreparationOptions) -> PreparationPlan:
    """Divide the work on a source by the footers of its files, which are checked."""
    files = [PublishedFile(path, 0, source.task_type, options.document_scores) for path in source.files]
    shards, row = [], 0
    for number, file in enumerate(files):
        start = rows = row_of_file = 0
        for end, group in enumerate(file.row_group_rows, start=1):
            rows += group
            if rows >= _SHARD_ROWS or end == len(file.row_group_rows):
                # Of a remote file, each part would fetch the rows before it.
                parts = max(min(rows // _SHARD_ROWS, _MOST_PARTS if isinstance(file.path, Path) else 1), 1)
                for first, last in pairwise(rows * part // parts for part in range(parts + 1)):
                    place = (row + first, row_of_file + first, last - first, first)
                    shards.append(Shard(number, (start, end), *place))
                start, row, row_of_file, rows = end, row + rows, row_of_file + rows, 0
    negatives = max(len(file.negatives) for file in files)
    required = required_negatives(dict(options.num_hard_negatives), source.task_type, negatives)
    for file in files:
        file.require(required)
    positives, has_ids = max(len(file.positives) for file in files), any(file.ids for file in files)
    has_scores = any(file.scores for file in files)
    plan = PreparationPlan(source, options, folder, negatives, required, tuple(shards), positives, has_ids, has_scores)
    wanted = -(-plan.cells // _PARTITION_CELLS)
    partitions = min(1 << max(0, wanted - 1).bit_length(), _MOST_PARTITIONS)
    highest_draw = None
    if source.cap is not None and source.cap < row:
        blocks = (np.arange(start, min(start + _SHARD_ROWS, row)) for start in range(0, row, _SHARD_ROWS))
        draws = np.concatenate([cap_draws(source, options, block) for block in blocks])
        draws.partition(source.cap - 1)
        highest_draw = int(draws[source.cap - 1])
    return replace(plan, partitions=partitions, highest_draw=highest_draw)


def cap_draws(source: Source, options: PreparationOptions, rows: np.ndarray) -> np.ndarray:
    """Return ``(n,)`` 64-bit draws for ``(n,)`` row numbers within the source."""
    return keyed_bits(options.seed, CAP, text_key(source.name), rows)
