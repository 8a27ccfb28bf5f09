"""Rows that are nearly the same, found by ``datatrove``'s MinHash and then compared for certain.

A row has two sides. A long side is the set of its runs of five tokens; a short one, which says something else when one
word of it changes, counts as a whole. Two rows are near duplicates if both sides are: an equal short side, or long ones
that share most of their runs. The questions about one paragraph therefore stay.

``datatrove`` signs rows, brings equal signatures together and joins pairs to clusters. Its signatures alone would also
pair rows half alike, so the pairs are verified in between.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.word_tokenizers import WordTokenizer

from training.common.executor import Phase
from training.common.keyed import keyed_bits
from training.data.cleaning.normalise import hash_texts, ngram_hashes
from training.data.published import PublishedFile

_PAIRS_PER_READ = 1024
# Each takes every seventh bucket.
_BUCKET_TASKS = 7
# The hashes of a batch of long passages are to fit in some hundred megabytes.
_BATCH_ROWS = 2048


@dataclass(frozen=True)
class NearOptions:
    """What counts as nearly the same.

    Attributes:
        similarity: Share of runs that two long sides have in common (Jaccard), at least.
        min_tokens: Sides of fewer tokens are compared as wholes.
        ngram: Tokens in a run.
        buckets: Groups of hashes in a signature, each of which may bring two rows together.
        hashes: Hashes in a group. The defaults are ``datatrove``'s: at a similarity of 0.7 two rows meet with a
            probability of 0.56, at 0.8 of 0.92, at 0.9 of 0.9996.
    """

    similarity: float = 0.7
    min_tokens: int = 30
    ngram: int = 5
    buckets: int = 14
    hashes: int = 8

    def config(self) -> MinhashConfig:
        """The same in ``datatrove``'s terms."""
        return MinhashConfig(n_grams=self.ngram, num_buckets=self.buckets, hashes_per_bucket=self.hashes)


def near_phases(
    files: Sequence[Path], source_of: Sequence[int], across: bool, options: NearOptions, folder: Path
) -> list[Phase]:
    """The work of finding near duplicates: by file, by bucket, and one task that joins pairs to clusters.

    Args:
        files: All files of all sources, in the order in which rows are kept.
        source_of: The number of each file's source.
        across: Whether rows of different sources are compared.
        options: What counts as nearly the same.
        folder: Where signatures, pairs and clusters go.
    """
    files = tuple(files)
    return [
        Phase("near-signatures", partial(_sign, files, options, folder), len(files)),
        Phase("near-pairs", partial(_pair, options, folder), _BUCKET_TASKS),
        Phase("near-candidates", partial(_gather, files, options, folder), len(files)),
        Phase("near-verified", partial(_verify, tuple(source_of), across, options, folder), _BUCKET_TASKS),
        Phase("near-clusters", partial(_cluster, options, folder), 1),
    ]


def near_groups(num_files: int, folder: Path) -> np.ndarray:
    """Rows of near duplicates, ``(rows, 3)``: a number for the group, the file and the row."""
    parts = [np.empty((0, 3), dtype=np.int64)]
    for number in range(num_files):
        path = folder / "clusters" / f"{number:06d}.clusters"
        if path.exists():
            row, group = np.fromfile(path, dtype="<u4").reshape(-1, 2).T.astype(np.int64)
            parts.append(np.stack([group, np.full_like(row, number), row], axis=1))
    return np.concatenate(parts)


def discard_intermediate(folder: Path) -> None:
    """Deletes what is not needed once there are clusters: signatures take a kilobyte a row."""
    for name in ("signatures", "pairs", "candidates", "verified"):
        shutil.rmtree(folder / name, ignore_errors=True)


class _Sides:
    """One column of some rows as hashes: of the runs of a long text, of the whole of a short one."""

    def __init__(self, texts: Sequence[str], options: NearOptions) -> None:
        hashed = hash_texts(texts)
        self.wholes, self.long = hashed.wholes, hashed.lengths >= options.min_tokens
        self._runs, self._owner = ngram_hashes(hashed, options.ngram)
        self._bounds = np.searchsorted(self._owner, np.arange(len(texts) + 1))

    def __getitem__(self, row: int) -> np.ndarray:
        return self._of(self._runs, row) if self.long[row] else self.wholes[row : row + 1]

    def _of(self, runs: np.ndarray, row: int) -> np.ndarray:
        return runs[self._bounds[row] : self._bounds[row + 1]]

    def keyed(self, keys: np.ndarray) -> Callable[[int], np.ndarray]:
        """The runs of a row, none for a short text, as other hashes under the key of the row."""
        runs = keyed_bits(self._runs, keys[self._owner])
        return lambda row: self._of(runs, row) if self.long[row] else runs[:0]


class _NoTokenizer(WordTokenizer):
    """datatrove asks for a tokenizer of one language; the rows are in many, and come hashed."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize


class _Signature(MinhashDedupSignature):
    """Signs the runs of both sides of a row, which are hashed for many rows at once."""

    def __init__(self, folder: Path, options: NearOptions) -> None:
        super().__init__(str(folder), options.config(), _NoTokenizer())
        self.options = options
        self._shingles = np.empty((0, 1), dtype=np.uint64)

    def documents(self, path: Path) -> Iterator[Document]:
        """Yields a document for each row, whose runs are those that ``get_shingles`` returns meanwhile."""
        for batch in PublishedFile(path).batches(_BATCH_ROWS, raw=True):
            queries, passages = (_Sides(batch.columns[column], self.options) for column in ("query", "passage"))
            # Runs go under the hash of a short other side: rows that differ in it never meet.
            of_query = queries.keyed(np.where(passages.long, np.uint64(1), passages.wholes))
            of_passage = passages.keyed(np.where(queries.long, np.uint64(2), queries.wholes))
            for row in range(len(batch)):
                self._shingles = np.concatenate([of_query(row), of_passage(row)]).reshape(-1, 1)
                yield Document(text="", id="")

    def get_shingles(self, text: str) -> np.ndarray:
        """Runs of tokens as ``(runs, 1)`` hashes; a row of two short sides has none and is left out."""
        return self._shingles


def _sign(files: Sequence[Path], options: NearOptions, folder: Path, task: int) -> None:
    step = _Signature(folder / "signatures", options)
    step.run(step.documents(files[task]), rank=task)


def _pair(options: NearOptions, folder: Path, task: int) -> None:
    step = MinhashDedupBuckets(
        str(folder / "signatures"), str(folder / "pairs"), config=options.config(), lines_to_buffer=_PAIRS_PER_READ
    )
    for bucket in range(task, options.buckets, _BUCKET_TASKS):
        step.run(rank=bucket, world_size=options.buckets)


def _pairs(folder: Path, bucket: int) -> np.ndarray:
    """``(pairs, 4)``: file and row of one, file and row of the other."""
    return np.fromfile(folder / "pairs" / f"{bucket:05d}_00.dups", dtype="<u4").reshape(-1, 4)


def _gather(files: Sequence[Path], options: NearOptions, folder: Path, task: int) -> None:
    """Writes the hashes of the sides of all rows of a file that are in some pair."""
    pairs = (_pairs(folder, bucket).reshape(-1, 2) for bucket in range(options.buckets))
    rows = np.unique(np.concatenate([ends[ends[:, 0] == task, 1] for ends in pairs])).astype(np.int64)
    sides: list[np.ndarray] = []
    for batch in PublishedFile(files[task]).batches(_BATCH_ROWS, raw=True) if len(rows) else ():
        start, end = np.searchsorted(rows, (batch.first_row, batch.first_row + len(batch)))
        chosen = (rows[start:end] - batch.first_row).tolist()
        columns = [[batch.columns[column][row] for row in chosen] for column in ("query", "passage")]
        queries, passages = (_Sides(texts, options) for texts in columns)
        for row in range(len(chosen)):
            sides += [np.unique(queries[row]), np.unique(passages[row])]
    own = folder / "candidates" / f"{task:05d}"
    own.mkdir(parents=True, exist_ok=True)
    np.save(own / "rows.npy", rows)
    np.save(own / "offsets.npy", np.cumsum([0, *map(len, sides)]))
    np.save(own / "hashes.npy", np.concatenate([*sides, np.empty(0, dtype=np.uint64)]))


class _Candidates:
    """The sides of the rows of one file that are in some pair."""

    def __init__(self, folder: Path) -> None:
        self._rows, self._offsets, self._hashes = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "offsets", "hashes")
        )

    def sides(self, row: int) -> list[np.ndarray]:
        first = 2 * int(np.searchsorted(self._rows, row))
        return [self._hashes[self._offsets[i] : self._offsets[i + 1]] for i in (first, first + 1)]


def _similarity(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _verify(source_of: Sequence[int], across: bool, options: NearOptions, folder: Path, task: int) -> None:
    for bucket in range(task, options.buckets, _BUCKET_TASKS):
        _verify_bucket(source_of, across, options, folder, bucket)


def _verify_bucket(source_of: Sequence[int], across: bool, options: NearOptions, folder: Path, bucket: int) -> None:
    """Leaves the pairs of rows whose sides are alike, and that may be compared."""
    sources = np.asarray(source_of)
    pairs = _pairs(folder, bucket)
    if not across:
        pairs = pairs[sources[pairs[:, 0]] == sources[pairs[:, 2]]]
    candidates = {
        number: _Candidates(folder / "candidates" / f"{number:05d}") for number in np.unique(pairs[:, ::2]).tolist()
    }
    alike = [
        all(
            _similarity(*sides) >= options.similarity
            for sides in zip(candidates[file].sides(row), candidates[other].sides(other_row), strict=True)
        )
        for file, row, other, other_row in pairs.tolist()
    ]
    verified = folder / "verified"
    verified.mkdir(parents=True, exist_ok=True)
    pairs[np.array(alike, dtype=bool)].tofile(verified / f"{bucket:05d}_00.dups")


def _cluster(options: NearOptions, folder: Path, task: int) -> None:
    step = MinhashDedupCluster(
        str(folder / "verified"),
        str(folder / "clusters"),
        config=options.config(),
        save_cluster_id=True,
        lines_to_buffer=_PAIRS_PER_READ,
    )
    step.run()
