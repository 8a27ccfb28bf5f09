"""Duplicates inside a source and across sources: which rows repeat an earlier one, and which.

The first row stays: by the order of the manifest, then of a source's files, then by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from training.common.executor import Executor, run_phases
from training.data.cleaning.exact_duplicates import exact_groups, exact_phases
from training.data.cleaning.near_duplicates import NearOptions, discard_intermediate, near_groups, near_phases
from training.data.cleaning.work import stage_folder


@dataclass(frozen=True)
class DeduplicationOptions:
    """Which duplicates are looked for.

    Attributes:
        exact: Pairs that are equal once normalised.
        near: Pairs that are nearly equal.
        across: Whether rows of different sources are compared, too.
        near_options: What counts as nearly equal.
    """

    exact: bool = True
    near: bool = False
    across: bool = False
    near_options: NearOptions = field(default_factory=NearOptions)


@dataclass(frozen=True)
class Repeats:
    """Rows that repeat an earlier one, in order.

    Attributes:
        file: ``(n,)`` number of the file of each.
        row: ``(n,)`` row within the file.
        first_file: ``(n,)`` file of the row that it repeats: the first of its own source if there is one.
        first_row: ``(n,)`` row within that file.
        inside: ``(n,)`` whether that is a row of the same source.
    """

    file: np.ndarray
    row: np.ndarray
    first_file: np.ndarray
    first_row: np.ndarray
    inside: np.ndarray

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, chosen: np.ndarray) -> Repeats:
        return Repeats(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def find_duplicates(
    files: Sequence[Path],
    source_of: Sequence[int],
    options: DeduplicationOptions,
    work: Path,
    executor: Executor | None = None,
) -> dict[str, Repeats]:
    """Finds the rows that repeat an earlier one.

    Args:
        files: All files of all sources, in the order in which rows are kept; the files of a source stand together.
        source_of: The number of each file's source, rising.
        options: What to look for.
        work: Where hashes and the state of tasks go. What is finished there and unchanged is used again.
        executor: Where tasks run; local processes if None.

    Returns:
        ``exact`` and ``near``, those that were looked for. A row that is an exact duplicate is not a near one.

    Raises:
        UserError: If a file is faulty.
    """
    found: dict[str, Repeats] = {}
    if options.exact:
        folder = stage_folder(work, "exact", files, [list(source_of), options.across])
        run_phases(exact_phases(files, source_of, options.across, folder), folder / "tasks", executor)
        found["exact"] = _repeats(exact_groups(folder), source_of)
    if options.near:
        near = options.near_options
        folder = stage_folder(work, "near", files, [list(source_of), options.across, asdict(near)])
        run_phases(near_phases(files, source_of, options.across, near, folder), folder / "tasks", executor)
        discard_intermediate(folder)
        found["near"] = _repeats(near_groups(len(files), folder), source_of)
    if len(found) == 2:
        found["near"] = found["near"][~_in(found["near"], found["exact"])]
    return found


def _in(rows: Repeats, others: Repeats) -> np.ndarray:
    width = int(max(rows.row.max(initial=0), others.row.max(initial=0))) + 1
    return np.isin(rows.file * width + rows.row, others.file * width + others.row)


def _repeats(groups: np.ndarray, source_of: Sequence[int]) -> Repeats:
    """What repeats in groups of equal rows, ``(rows, 3)``: group, file and row."""
    group, file, row = groups[np.lexsort(groups.T[::-1])].T
    source = np.asarray(source_of, dtype=np.int64)[file]
    new_group = np.ones(len(group), dtype=bool)
    new_group[1:] = group[1:] != group[:-1]
    new_source = new_group.copy()
    new_source[1:] |= source[1:] != source[:-1]
    positions = np.arange(len(group))
    first_of_group = np.maximum.accumulate(np.where(new_group, positions, 0))
    first_of_source = np.maximum.accumulate(np.where(new_source, positions, 0))
    first = np.where(new_source, first_of_group, first_of_source)
    repeats = Repeats(file, row, file[first], row[first], ~new_source)[~new_group]
    return repeats[np.lexsort((repeats.row, repeats.file))]
