"""Rows whose pair of query and passage repeats once form is set aside.

``datatrove``'s exact deduplication keeps the lowest row number whichever file it is in, and does not say which row a
duplicate repeats; sorting hashes gives both in a few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from training.common.executor import Phase
from training.common.keyed import text_key
from training.data.cleaning.normalise import normalise
from training.data.published import PublishedFile

# Each sorts its share of all hashes in memory: 50 million rows are 300 MB a partition.
_PARTITIONS = 4


def exact_phases(files: Sequence[Path], source_of: Sequence[int], across: bool, folder: Path) -> list[Phase]:
    """The work of finding exact duplicates: one task a file, then one task a range of hashes.

    Args:
        files: All files of all sources, in the order in which rows are kept.
        source_of: The number of each file's source.
        across: Whether rows of different sources are compared.
        folder: Where hashes and groups go.
    """
    hash_file = partial(_hash_file, tuple(files), folder)
    find_groups = partial(_find_groups, tuple(source_of), across, folder)
    return [Phase("exact-hashes", hash_file, len(files)), Phase("exact-groups", find_groups, _PARTITIONS)]


def exact_groups(folder: Path) -> np.ndarray:
    """Rows of equal pairs, ``(rows, 3)``: a number for the group, the file and the row; only groups of two or more."""
    parts, start = [], 0
    for number in range(_PARTITIONS):
        part = np.load(folder / f"groups_{number:02d}.npy")
        part[:, 0] += start
        start = int(part[:, 0].max(initial=start - 1)) + 1
        parts.append(part)
    return np.concatenate(parts)


def _hash_file(files: Sequence[Path], folder: Path, task: int) -> None:
    """Writes the hashes of a file's pairs, sorted: three rows, those of the query, the passage and the row number."""
    parts = [np.empty((3, 0), dtype=np.uint64)]
    for batch in PublishedFile(files[task]).batches(raw=True):
        hashes = np.empty((3, len(batch)), dtype=np.uint64)
        for i, column in enumerate(("query", "passage")):
            hashes[i] = [text_key(normalise(text)) for text in batch.columns[column]]
        hashes[2] = np.arange(batch.first_row, batch.first_row + len(batch))
        parts.append(hashes)
    hashes = np.concatenate(parts, axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"hashes_{task:05d}.npy", hashes[:, np.lexsort(hashes[::-1])])


def _find_groups(source_of: Sequence[int], across: bool, folder: Path, task: int) -> None:
    width = 2**64 // _PARTITIONS
    bounds = np.array([task * width, (task + 1) * width - 1], dtype=np.uint64)
    parts, numbers = [], []
    for number in range(len(source_of)):
        # Sorted, so that only this task's part of the file is read.
        hashes = np.load(folder / f"hashes_{number:05d}.npy", mmap_mode="r")
        start, end = np.searchsorted(hashes[0], bounds[0]), np.searchsorted(hashes[0], bounds[1], side="right")
        parts.append(np.asarray(hashes[:, start:end]))
        numbers.append(np.full(end - start, number, dtype=np.int64))
    (queries, passages, rows), file = np.concatenate(parts, axis=1), np.concatenate(numbers)
    source = np.zeros(len(file), dtype=np.int64) if across else np.asarray(source_of, dtype=np.int64)[file]
    order = np.lexsort((rows, file, source, passages, queries))
    keys = [key[order] for key in (queries, passages, source)]
    differs = np.ones(len(order), dtype=bool)
    differs[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    group = np.cumsum(differs) - 1
    repeated = np.bincount(group)[group] > 1 if len(group) else differs
    found = np.stack([group, file[order], rows[order].astype(np.int64)], axis=1)[repeated]
    np.save(folder / f"groups_{task:02d}.npy", found)
