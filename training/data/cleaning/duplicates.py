"""Rows that repeat an earlier row, exactly or nearly, inside a source or across sources.

The first row stays: by the order of the manifest, then of a source's files, then by row.

``datatrove``'s exact deduplication does not say which row a duplicate repeats, so hashes are sorted here. Its MinHash
finds near duplicates, which are then compared: signatures alone would also pair rows that are only half similar. A row
has two sides, query and passage. A long side is the set of its runs of five tokens; a short one, which changes its
meaning with one word, is compared as a whole. Both sides must be similar: different questions about one paragraph stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupSignature,
)
from datatrove.utils.word_tokenizers import WordTokenizer
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.common.executor import Executor, Phase, run_phases
from training.common.keyed import keyed_bits, text_key
from training.data.cleaning.normalise import hash_texts, ngram_hashes, normalise
from training.data.published import PublishedFile
from training.data.storage import stage_folder

# Of exact hashes; each is sorted in memory: 50 million rows are 300 MB per partition.
_PARTITIONS = 4
# A shorter side is compared as a whole; a longer one by its runs of so many tokens.
_MIN_TOKENS, _RUN = 30, 5
# datatrove's defaults: two rows of a similarity of 0.7 meet with a probability of 0.56, of 0.8 with 0.92, of 0.9 with
# 0.9996.
_BUCKETS, _HASHES = 14, 8
_CONFIG = MinhashConfig(n_grams=_RUN, num_buckets=_BUCKETS, hashes_per_bucket=_HASHES)
_BUCKET_TASKS = 7
_PAIRS_PER_READ = 1024
# Bits of a row number beside that of its file.
_ROW_BITS = 40
# The hashes of a batch of long passages should fit into some hundred megabytes.
_BATCH_ROWS = 2048

# Rows that repeat an earlier one: file and row of each, file and row of the one that it repeats (the first of the same
# source if there is one), and whether that one is in the same source.
REPEATS = np.dtype([("file", "i8"), ("row", "i8"), ("first_file", "i8"), ("first_row", "i8"), ("inside", "?")])


@dataclass(frozen=True)
class DeduplicationOptions:
    """Which duplicates to look for."""

    exact: bool = True  # pairs that are equal when normalised
    near: bool = False  # pairs that are nearly equal
    across: bool = False  # also compare rows of different sources
    similarity: float = 0.7  # share of runs that two nearly equal long sides have in common at least (Jaccard)


def find_duplicates(
    files: Sequence[Path],
    source_of: Sequence[int],
    options: DeduplicationOptions,
    work: Path,
    executor: Executor | None = None,
) -> dict[str, np.ndarray]:
    """Find the rows that repeat an earlier one.

    Args:
        files: All files of all sources, in the order in which rows are kept.
        source_of: The number of each file's source, ascending.
        options: What to look for.
        work: Folder of intermediate results, which are reused while files and options stay the same.
        executor: Where tasks run.

    Returns:
        ``(n,)`` ``REPEATS`` for ``exact`` and ``near``, as asked for. Exact duplicates are not also near ones.
    """
    files, source_of = tuple(files), tuple(source_of)
    found: dict[str, np.ndarray] = {}
    if options.exact:
        folder = stage_folder(work, "exact", files, [source_of, options.across, REPEATS.names])
        phases = [
            Phase("exact-hashes", partial(_hash_file, files, folder), len(files)),
            Phase("exact-groups", partial(_find_exact, source_of, options.across, folder), _PARTITIONS),
        ]
        run_phases(phases, folder / "tasks", executor)
        found["exact"] = np.concatenate([np.load(folder / f"repeats_{part:02d}.npy") for part in range(_PARTITIONS)])
    if options.near:
        limits = [_MIN_TOKENS, _RUN, _BUCKETS, _HASHES, options.similarity, REPEATS.names]
        folder = stage_folder(work, "near", files, [source_of, options.across, limits])
        verify = partial(_verify, source_of if not options.across else (0,) * len(files), options.similarity, folder)
        phases = [
            Phase("near-signatures", partial(_sign, files, folder), len(files)),
            Phase("near-pairs", partial(_pair, folder), _BUCKET_TASKS),
            Phase("near-candidates", partial(_gather, files, folder), len(files)),
            Phase("near-verified", verify, _BUCKET_TASKS),
        ]
        run_phases(phases, folder / "tasks", executor)
        # Signatures take a kilobyte per row.
        for name in ("signatures", "pairs", "candidates"):
            shutil.rmtree(folder / name, ignore_errors=True)
        pairs = np.concatenate([np.load(folder / f"verified_{task}.npy") for task in range(_BUCKET_TASKS)])
        rows, ends = np.unique(_row_keys(pairs[:, ::2], pairs[:, 1::2]), return_inverse=True)
        graph = coo_array((np.ones(len(pairs)), ends.reshape(-1, 2).T), shape=(len(rows), len(rows)))
        _, group = connected_components(graph, directed=False)
        found["near"] = _repeats(group, rows >> _ROW_BITS, rows & (1 << _ROW_BITS) - 1, source_of)
    keys = {kind: _row_keys(repeats["file"], repeats["row"]) for kind, repeats in found.items()}
    found = {kind: repeats[np.argsort(keys[kind])] for kind, repeats in found.items()}
    if len(found) == 2:
        found["near"] = found["near"][~np.isin(np.sort(keys["near"]), keys["exact"])]
    return found


def _row_keys(file: np.ndarray, row: np.ndarray) -> np.ndarray:
    return (file.astype(np.int64) << _ROW_BITS) + row


def _repeats(group: np.ndarray, file: np.ndarray, row: np.ndarray, source_of: Sequence[int]) -> np.ndarray:
    """``REPEATS`` among rows with ``(n,)`` numbers of their group, file and row."""
    group, file, row = np.stack([group, file, row])[:, np.lexsort((row, file, group))]
    source = np.asarray(source_of, dtype=np.int64)[file]
    new_group = np.diff(group, prepend=-1) != 0
    new_source = new_group | (np.diff(source, prepend=-1) != 0)
    index = np.arange(len(group))
    first_of_group, first_of_source = (
        np.maximum.accumulate(np.where(new, index, 0)) for new in (new_group, new_source)
    )
    first = np.where(new_source, first_of_group, first_of_source)
    repeats = np.empty(len(group), dtype=REPEATS)
    for name, values in zip(REPEATS.names, (file, row, file[first], row[first], ~new_source), strict=True):
        repeats[name] = values
    return repeats[~new_group]


# Exact duplicates


def _hash_file(files: Sequence[Path], folder: Path, task: int) -> None:
    """Write ``(3, rows)`` hashes of query and passage and row numbers of a file, sorted."""
    parts = [np.empty((3, 0), dtype=np.uint64)]
    for batch in PublishedFile(files[task]).batches(raw=True):
        keys = [[text_key(normalise(text)) for text in batch.columns[column]] for column in ("query", "passage")]
        parts.append(np.array([*keys, range(batch.first_row, batch.first_row + len(batch))], dtype=np.uint64))
    hashes = np.concatenate(parts, axis=1)
    np.save(folder / f"hashes_{task:05d}.npy", hashes[:, np.lexsort(hashes[::-1])])


def _find_exact(source_of: Sequence[int], across: bool, folder: Path, task: int) -> None:
    width = 2**64 // _PARTITIONS
    low, high = np.array([task * width, (task + 1) * width - 1], dtype=np.uint64)
    parts, files = [], []
    for number in range(len(source_of)):
        # Sorted, so that only this task's part of the file is read.
        hashes = np.load(folder / f"hashes_{number:05d}.npy", mmap_mode="r")
        start, end = np.searchsorted(hashes[0], low), np.searchsorted(hashes[0], high, side="right")
        parts.append(np.asarray(hashes[:, start:end]))
        files.append(np.full(end - start, number))
    (queries, passages, rows), file = np.concatenate(parts, axis=1), np.concatenate(files)
    source = np.zeros_like(file) if across else np.asarray(source_of)[file]
    order = np.lexsort((source, passages, queries))
    keys = np.stack([queries, passages, source.astype(np.uint64)])[:, order]
    new = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    group = np.cumsum(np.append(False, new))[: len(order)]
    np.save(folder / f"repeats_{task:02d}.npy", _repeats(group, file[order], rows[order].astype(np.int64), source_of))


# Near duplicates


class _Sides:
    """One column of some rows as hashes of the runs of long texts and of the whole of short ones."""

    def __init__(self, texts: Sequence[str]) -> None:
        hashed = hash_texts(texts)
        self.wholes, self.long = hashed.wholes, hashed.lengths >= _MIN_TOKENS
        self._runs, self._owner = ngram_hashes(hashed, _RUN)

    def _split(self, runs: np.ndarray) -> list[np.ndarray]:
        return np.split(runs, np.searchsorted(self._owner, np.arange(1, len(self.long))))

    def sets(self) -> list[np.ndarray]:
        """Sorted distinct hashes of each row."""
        runs = self._split(self._runs)
        return [np.unique(runs[row]) if long else self.wholes[row : row + 1] for row, long in enumerate(self.long)]

    def keyed(self, keys: np.ndarray) -> list[np.ndarray]:
        """The runs of each row, mixed with its key; none for a short text."""
        runs = self._split(keyed_bits(self._runs, keys[self._owner]))
        return [each if long else each[:0] for each, long in zip(runs, self.long, strict=True)]


class _NoTokenizer(WordTokenizer):
    """datatrove asks for a tokenizer of one language; these rows have many languages and are already hashed."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize


class _Signature(MinhashDedupSignature):
    """Signs the runs of both sides of a row, which are hashed for many rows at once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), _CONFIG, _NoTokenizer())
        self._shingles = np.empty((0, 1), dtype=np.uint64)

    def documents(self, path: Path) -> Iterator[Document]:
        """Yield a document per row; ``get_shingles`` returns the row's runs until the next one."""
        for batch in PublishedFile(path).batches(_BATCH_ROWS, raw=True):
            queries, passages = (_Sides(batch.columns[column]) for column in ("query", "passage"))
            # Runs are mixed with the hash of a short other side: rows that differ in it never meet.
            of_query = queries.keyed(np.where(passages.long, np.uint64(1), passages.wholes))
            of_passage = passages.keyed(np.where(queries.long, np.uint64(2), queries.wholes))
            for runs in zip(of_query, of_passage, strict=True):
                self._shingles = np.concatenate(runs).reshape(-1, 1)
                yield Document(text="", id="")

    def get_shingles(self, text: str) -> np.ndarray:
        """Return ``(runs, 1)`` hashes; a row of two short sides has none and is left out."""
        return self._shingles


def _sign(files: Sequence[Path], folder: Path, task: int) -> None:
    step = _Signature(folder / "signatures")
    step.run(step.documents(files[task]), rank=task)


def _pair(folder: Path, task: int) -> None:
    step = MinhashDedupBuckets(
        str(folder / "signatures"), str(folder / "pairs"), config=_CONFIG, lines_to_buffer=_PAIRS_PER_READ
    )
    for bucket in range(task, _BUCKETS, _BUCKET_TASKS):
        step.run(rank=bucket, world_size=_BUCKETS)


def _pairs(folder: Path, bucket: int) -> np.ndarray:
    """``(pairs, 4)``: file and row of the one, file and row of the other."""
    return np.fromfile(folder / "pairs" / f"{bucket:05d}_00.dups", dtype="<u4").reshape(-1, 4)


def _gather(files: Sequence[Path], folder: Path, task: int) -> None:
    """Write the hashes of both sides of all rows of a file that are in some pair."""
    ends = np.concatenate([_pairs(folder, bucket).reshape(-1, 2) for bucket in range(_BUCKETS)])
    rows = np.unique(ends[ends[:, 0] == task, 1]).astype(np.int64)
    sides: list[np.ndarray] = [np.empty(0, dtype=np.uint64)]
    for batch in PublishedFile(files[task]).batches(_BATCH_ROWS, raw=True) if len(rows) else ():
        start, end = np.searchsorted(rows, (batch.first_row, batch.first_row + len(batch)))
        chosen = (rows[start:end] - batch.first_row).tolist()
        columns = [[batch.columns[column][row] for row in chosen] for column in ("query", "passage")]
        for both in zip(*(_Sides(texts).sets() for texts in columns), strict=True):
            sides += both
    own = folder / "candidates" / f"{task:05d}"
    own.mkdir(parents=True, exist_ok=True)
    np.save(own / "rows.npy", rows)
    np.save(own / "offsets.npy", np.cumsum([*map(len, sides)]))
    np.save(own / "hashes.npy", np.concatenate(sides))


def _verify(source_of: Sequence[int], similarity: float, folder: Path, task: int) -> None:
    """Keep the pairs of one source in which both sides are similar."""

    @cache
    def candidates(file: int) -> list[np.ndarray]:
        own = folder / "candidates" / f"{file:05d}"
        return [np.load(own / f"{name}.npy", mmap_mode="r") for name in ("rows", "offsets", "hashes")]

    def sides(file: int, row: int) -> list[np.ndarray]:
        rows, offsets, hashes = candidates(file)
        first = 2 * int(np.searchsorted(rows, row))
        return [hashes[offsets[i] : offsets[i + 1]] for i in (first, first + 1)]

    sources = np.asarray(source_of)
    pairs = np.concatenate([_pairs(folder, bucket) for bucket in range(task, _BUCKETS, _BUCKET_TASKS)])
    pairs = np.unique(pairs[sources[pairs[:, 0]] == sources[pairs[:, 2]]], axis=0)
    similar = [
        all(_jaccard(*both) >= similarity for both in zip(sides(file, row), sides(other, other_row), strict=True))
        for file, row, other, other_row in pairs.tolist()
    ]
    np.save(folder / f"verified_{task}.npy", pairs[np.array(similar, dtype=bool)])


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
