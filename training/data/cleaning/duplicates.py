"""Rows that repeat an earlier row, exactly or nearly, inside a source or across sources; the first row stays.

Candidates for near duplicates are found by MinHash (Broder, "On the resemblance and containment of documents", 1997)
with the parameters of ``datatrove``, whose own step does not say which row each repeats. Then both sides of a row are
compared: a long query or passage as the set of its runs of five tokens, a short one as a whole, because one word
changes its meaning. So different questions about one paragraph stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from training.common.executor import Executor, Phase, run_phases
from training.common.keyed import keyed_bits, text_key
from training.data.cleaning.normalise import hash_texts, ngram_hashes, normalise
from training.data.published import PublishedFile
from training.data.storage import stage_folder

# A shorter side is compared as a whole; a longer one by its runs of so many tokens.
_MIN_TOKENS, _RUN = 30, 5
# Two rows of a similarity of 0.7 meet in a bucket with a probability of 0.56, of 0.8 with 0.92, of 0.9 with 0.9996.
_BUCKETS, _HASHES = 14, 8
# Random permutations h(x) = (a x + b) mod p of the runs' hashes; datatrove's seed.
_PRIME, _RANDOM = np.uint64((1 << 61) - 1), np.random.RandomState(1)
_FACTORS, _TERMS = (_RANDOM.randint(low, _PRIME, dtype=np.uint64, size=_BUCKETS * _HASHES) for low in (1, 0))
# A row's key is the number of its file and, in so many bits, that of the row.
_ROW_BITS = 40
# The hashes of a batch of long passages should fit into some hundred megabytes.
_BATCH_ROWS = 2048
_PAIRS_AT_ONCE = 100_000


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
) -> dict[str, pd.DataFrame]:
    """Return the repeats for ``exact`` and ``near``, as asked for; exact duplicates are not also near ones.

    Their columns are ``file`` and ``row``, ``first_file`` and ``first_row`` of the row that it repeats (the first one
    of the same source if there is one), and whether that one is ``inside`` the same source. Rows are kept in the order
    of ``files``; ``source_of`` is the number of each file's source, ascending. Intermediate results in the folder
    ``work`` are reused while files and options stay the same.
    """
    files, sources = tuple(files), np.array(source_of, dtype=np.int64)
    # Rows are compared within a group of files.
    groups = np.zeros_like(sources) if options.across else sources
    found: dict[str, pd.DataFrame] = {}
    if options.exact:
        folder = stage_folder(work, "exact", files, [])
        run_phases([Phase("exact", partial(_hash_rows, files, folder), len(files))], folder / "tasks", executor)
        hashes = [np.load(folder / f"hashes_{number:05d}.npy") for number in range(len(files))]
        rows = np.concatenate([(n << _ROW_BITS) + np.arange(part.shape[1]) for n, part in enumerate(hashes)])
        keys = np.stack([*np.concatenate(hashes, axis=1), groups[rows >> _ROW_BITS].astype(np.uint64)])
        found["exact"] = _repeats(np.unique(keys, axis=1, return_inverse=True)[1].ravel(), rows, sources)
    if options.near:
        folder = stage_folder(work, "near", files, [groups.tolist(), _MIN_TOKENS, _RUN, _BUCKETS, _HASHES])
        phases = [
            Phase("near-signatures", partial(_sign, files, folder), len(files)),
            Phase("near-pairs", partial(_pair, groups, folder), _BUCKETS),
            Phase("near-candidates", partial(_gather, files, folder), len(files)),
        ]
        run_phases(phases, folder / "tasks", executor)
        pairs = np.concatenate([np.load(folder / f"pairs_{bucket}.npy") for bucket in range(_BUCKETS)])
        parts = [folder / f"sides_{number:05d}.npz" for number in range(len(files))]
        rows, ends = np.unique(_similar(np.unique(pairs, axis=0), options.similarity, parts), return_inverse=True)
        graph = coo_array((np.ones(ends.size // 2), ends.reshape(-1, 2).T), shape=(len(rows), len(rows)))
        found["near"] = _repeats(connected_components(graph, directed=False)[1], rows, sources)
        if options.exact:
            exact, near = (pd.MultiIndex.from_frame(each[["file", "row"]]) for each in found.values())
            found["near"] = found["near"][~near.isin(exact)]
    return found


def _repeats(group: np.ndarray, keys: np.ndarray, sources: np.ndarray) -> pd.DataFrame:
    """Return the repeats among rows with ``(n,)`` numbers of their group and ``(n,)`` keys."""
    rows = pd.DataFrame({"group": group, "source": sources[keys >> _ROW_BITS], "key": keys}).sort_values("key")
    of_group = rows.groupby("group")["key"].transform("first")
    of_source = rows.groupby(["group", "source"])["key"].transform("first")
    inside = of_source < rows["key"]
    columns = (rows["key"], of_source.where(inside, of_group), inside)
    key, first, inside = (column[of_group < rows["key"]].to_numpy() for column in columns)
    repeats = {"file": key >> _ROW_BITS, "row": key & (1 << _ROW_BITS) - 1}
    repeats |= {"first_file": first >> _ROW_BITS, "first_row": first & (1 << _ROW_BITS) - 1, "inside": inside}
    return pd.DataFrame(repeats)


# Exact duplicates


def _hash_rows(files: Sequence[Path], folder: Path, task: int) -> None:
    """Write ``(2, rows)`` hashes of query and passage of a file."""
    parts = [np.empty((2, 0), dtype=np.uint64)]
    for batch in PublishedFile(files[task]).batches(raw=True):
        keys = [[text_key(normalise(text)) for text in side] for side in (batch.columns["query"], batch.passages)]
        parts.append(np.array(keys, dtype=np.uint64))
    np.save(folder / f"hashes_{task:05d}.npy", np.concatenate(parts, axis=1))


# Near duplicates


def _sign(files: Sequence[Path], folder: Path, task: int) -> None:
    """Write ``(buckets, n)`` keys of the ``n`` rows of a file with a long side, and their row numbers."""
    rows, keys = [np.empty(0, dtype=np.int64)], [np.empty((_BUCKETS, 0), dtype=np.uint64)]
    for batch in PublishedFile(files[task]).batches(_BATCH_ROWS, raw=True):
        sides = [hash_texts(side) for side in (batch.columns["query"], batch.passages)]
        runs, owners = [], []
        for number, (side, other) in enumerate(zip(sides, sides[::-1], strict=True), start=1):
            own, owner = ngram_hashes(side, _RUN)
            long = side.lengths[owner] >= _MIN_TOKENS
            # Runs are mixed with the hash of a short other side: rows that differ in it never meet.
            mixed = np.where(other.lengths >= _MIN_TOKENS, np.uint64(number), other.wholes)
            runs.append(keyed_bits(own[long], mixed[owner[long]]))
            owners.append(owner[long])
        order = np.argsort(np.concatenate(owners), kind="stable")
        of_row = np.concatenate(runs)[order]
        signed, starts = np.unique(np.concatenate(owners)[order], return_index=True)
        if len(signed):
            permutations = zip(_FACTORS, _TERMS, strict=True)
            least = [np.minimum.reduceat((of_row * factor + term) % _PRIME, starts) for factor, term in permutations]
            rows.append(signed + batch.first_row)
            keys.append(np.stack([keyed_bits(*least[i : i + _HASHES]) for i in range(0, len(least), _HASHES)]))
    np.save(folder / f"signed_{task:05d}.npy", np.concatenate(rows))
    np.save(folder / f"keys_{task:05d}.npy", np.concatenate(keys, axis=1))


def _pair(groups: np.ndarray, folder: Path, bucket: int) -> None:
    """Write ``(pairs, 2)`` neighbouring rows that have one key in a bucket."""
    files = range(len(groups))
    rows = np.concatenate([(n << _ROW_BITS) + np.load(folder / f"signed_{n:05d}.npy") for n in files])
    keys = np.concatenate([np.load(folder / f"keys_{n:05d}.npy", mmap_mode="r")[bucket] for n in files])
    order = np.argsort(keys, kind="stable")
    equal = keys[order][1:] == keys[order][:-1]
    pairs = np.stack([rows[order][:-1][equal], rows[order][1:][equal]], axis=1)
    group = groups[pairs >> _ROW_BITS]
    np.save(folder / f"pairs_{bucket}.npy", pairs[group[:, 0] == group[:, 1]])


def _sets(texts: Sequence[str]) -> list[np.ndarray]:
    """Return the sorted distinct hashes of each text: of its runs, or of the whole if it is short."""
    hashed = hash_texts(texts)
    runs, owner = ngram_hashes(hashed, _RUN)
    ends = np.searchsorted(owner, np.arange(len(texts) + 1)).tolist()
    return [
        np.unique(runs[ends[i] : ends[i + 1]]) if length >= _MIN_TOKENS else hashed.wholes[i : i + 1]
        for i, length in enumerate(hashed.lengths.tolist())
    ]


def _gather(files: Sequence[Path], folder: Path, task: int) -> None:
    """Write the keys of a file's rows that are in some pair, and the hashes of their queries and passages."""
    ends = np.unique(np.concatenate([np.load(folder / f"pairs_{bucket}.npy") for bucket in range(_BUCKETS)]))
    keys = ends[ends >> _ROW_BITS == task]
    rows, sides = keys & (1 << _ROW_BITS) - 1, [np.empty(0, dtype=np.uint64)]
    for batch in PublishedFile(files[task]).batches(_BATCH_ROWS, raw=True) if len(rows) else ():
        chosen = rows[(rows >= batch.first_row) & (rows < batch.first_row + len(batch))] - batch.first_row
        columns = [[side[row] for row in chosen.tolist()] for side in (batch.columns["query"], batch.passages)]
        for both in zip(*map(_sets, columns), strict=True):
            sides += both
    lengths = np.array([len(side) for side in sides[1:]], dtype=np.int64)
    np.savez(folder / f"sides_{task:05d}.npz", keys=keys, lengths=lengths, hashes=np.concatenate(sides))


def _similar(pairs: np.ndarray, similarity: float, parts: Sequence[Path]) -> np.ndarray:
    """Return those of ``(n, 2)`` pairs in which both sides are similar; ``parts`` are what :func:`_gather` wrote."""
    loaded = [dict(np.load(path)) for path in parts]
    keys, lengths, hashes = (np.concatenate([part[name] for part in loaded]) for name in ("keys", "lengths", "hashes"))
    values, columns = np.unique(hashes, return_inverse=True)
    shape = (len(lengths), len(values))
    # Rows 2 i and 2 i + 1 are the query and the passage of row i of the data.
    sets = csr_array((np.ones(len(hashes), np.int32), columns, np.append(0, np.cumsum(lengths))), shape=shape)
    kept = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        some = pairs[start : start + _PAIRS_AT_ONCE]
        similar = np.ones(len(some), dtype=bool)
        for side in (0, 1):
            one, other = 2 * np.searchsorted(keys, some).T + side
            shared = sets[one].multiply(sets[other]).sum(axis=1)
            similar &= shared / (lengths[one] + lengths[other] - shared) >= similarity
        kept.append(some[similar])
    return np.concatenate(kept)
