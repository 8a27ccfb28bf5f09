"""The texts of a source: numbered and stored on disk, with ids, embeddings by id, and rows as pairs of numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.outputs import check_file, checksums_of, locked, whole_file, write_whole
from training.data.cleaning.normalise import normalise
from training.data.manifest import Source
from training.data.published import PublishedFile, rows_table, write_parquet
from training.data.storage import SourceFile

SIDES = ("query", "passage")
# Texts that are stored, embedded and cached together: what a killed run loses at most.
CHUNK_TEXTS = 8192
# 128 bits of a text's hash. numpy sorts and compares such bytes; ignoring zeros at the end is harmless at equal length.
ID = np.dtype("S16")
Ids = NDArray[np.bytes_]

_BATCH_ROWS = 8192
_TEXT_SCHEMA = pa.schema([("text", pa.large_string())])
_KEYS, _VECTORS, _DESCRIPTION = ".keys.npy", ".vectors.npy", "embeddings.json"
_REMEDY = "delete it and its .keys.npy, and the texts are embedded again"


# Ids


def text_ids(texts: Iterable[str]) -> Ids:
    """Return ``(n,)`` ids; two of a thousand million texts have the same id with a probability of 1 in 10^21."""
    digests = b"".join(blake2b(text.encode(), digest_size=ID.itemsize).digest() for text in texts)
    return np.frombuffer(digests, dtype=ID)


def form_ids(texts: Iterable[str]) -> Ids:
    """Return ``(n,)`` ids of the normalised texts, which are equal for spellings of one text."""
    return text_ids(map(normalise, texts))


def distinct(ids: Ids) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64]]:
    """Number the distinct ids in the order of their first occurrence.

    Returns:
        The ``(m,)`` distinct ids, the ``(n,)`` numbers of the given ones, and ``(m,)`` first positions, ascending.
    """
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(unique), dtype=np.int64)
    number[order] = np.arange(len(unique))
    return unique[order], number[inverse.reshape(-1)], first[order]


def find(ids: Ids, among: Ids) -> NDArray[np.int64]:
    """Return ``(n,)`` positions of ids in a sorted array of distinct ids, -1 for missing ones."""
    if not len(among):
        return np.full(len(ids), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(among, ids), len(among) - 1)
    return np.where(among[at] == ids, at, -1)


# Texts and arrays on disk


class TextStore:
    """Texts by number, in a memory-mapped Arrow file with batches of ``CHUNK_TEXTS``."""

    def __init__(self, path: Path) -> None:
        check_file(path, f"delete {path.parent}, and it is mined again")
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    @staticmethod
    def write(path: Path, texts: Iterable[str]) -> None:
        """Write texts as they come."""
        texts = iter(texts)
        with whole_file(path, checksums=True) as partial, pa.ipc.new_file(str(partial), _TEXT_SCHEMA) as writer:
            while chunk := list(islice(texts, CHUNK_TEXTS)):
                writer.write_batch(pa.record_batch([pa.array(chunk, type=pa.large_string())], schema=_TEXT_SCHEMA))

    def chunks(self) -> Iterator[list[str]]:
        """Yield all texts in order, chunk by chunk."""
        for number in range(self._reader.num_record_batches):
            yield self._reader.get_batch(number).column(0).to_pylist()

    def take(self, numbers: NDArray[np.integer]) -> NDArray[np.object_]:
        """Return the texts of numbers in an array of the same shape; None for -1."""
        wanted, inverse = np.unique(numbers, return_inverse=True)
        texts = np.full(len(wanted), None, dtype=object)
        start = np.searchsorted(wanted, 0)
        for chunk in np.unique(wanted[start:] // CHUNK_TEXTS).tolist():
            stop = np.searchsorted(wanted, (chunk + 1) * CHUNK_TEXTS)
            column = self._reader.get_batch(chunk).column(0)
            texts[start:stop] = column.take(pa.array(wanted[start:stop] - chunk * CHUNK_TEXTS)).to_pylist()
            start = stop
        return texts[inverse.reshape(numbers.shape)]


def save_array(path: Path, array: NDArray[Any], checksums: bool = True) -> None:
    """Write an array; the file is complete or absent."""
    with whole_file(path, checksums) as partial, partial.open("wb") as file:
        np.save(file, array)


# Cached embeddings


class Locations(NamedTuple):
    """Where embeddings are stored."""

    names: list[str]  # of files, without suffixes
    file: NDArray[np.int32]  # (n,) indices into names; -1 for missing embeddings
    row: NDArray[np.int32]  # (n,)


class EmbeddingCache:
    """Embeddings that one model computed for texts of one role, by the id of the text.

    The folder ``<folder>/<digest of made_by>/`` holds pairs of files: sorted ids, and the embeddings in their order.
    Files are complete or absent, are named after their ids and never change. Any number of tasks may therefore write at
    once, and a repeated task writes the same file again.

    Args:
        folder: The folder of all caches.
        made_by: Everything an embedding depends on besides its text: model, revision, prompt, length, …
        half: Store 16 bits per number instead of 32.
    """

    def __init__(self, folder: Path | str, made_by: Mapping[str, Any], half: bool = False) -> None:
        description = json.dumps({**made_by, "dtype": "float16" if half else "float32"}, sort_keys=True, indent=2)
        self.folder = Path(folder) / blake2b(description.encode(), digest_size=16).hexdigest()
        self._dtype = np.float16 if half else np.float32
        path = self.folder / _DESCRIPTION
        try:
            # A finished cache may lie on a read-only disk.
            if not path.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(path):
                    write_whole(path, description)
        except OSError as error:
            raise UserError(
                f"{folder}: the folder of cached embeddings cannot be written ({error.strerror}); give another --cache"
            ) from None

    def add(self, ids: Ids, vectors: NDArray[np.floating]) -> None:
        """Store ``(n, dimensions)`` embeddings of ``(n,)`` ids, ``n`` at least 1."""
        order = np.argsort(ids)
        name = _name(ids[order])
        with locked(self.folder / name):
            save_array(self.folder / (name + _VECTORS), np.asarray(vectors)[order].astype(self._dtype))
            # Last: where the ids are found, the embeddings and their checksums exist.
            save_array(self.folder / (name + _KEYS), ids[order], checksums=False)

    def locate(self, ids: Ids) -> Locations:
        """Look up distinct ids."""
        names = [path.name.removesuffix(_KEYS) for path in sorted(self.folder.glob(f"[!.]*{_KEYS}"))]
        # Embeddings without checksums, of earlier versions, are computed again.
        names = [name for name in names if checksums_of(self.folder / (name + _VECTORS)).is_file()]
        order = np.argsort(ids)
        wanted = ids[order]
        file, row = np.full(len(ids), -1, dtype=np.int32), np.full(len(ids), -1, dtype=np.int32)
        for number, name in enumerate(names if len(ids) else []):
            keys = self._load_keys(name)
            at = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
            found = np.flatnonzero(wanted[at] == keys)
            file[order[at[found]]], row[order[at[found]]] = number, found
        return Locations(names, file, row)

    def _load_keys(self, name: str) -> Ids:
        path = self.folder / (name + _KEYS)
        try:
            keys = np.load(path)
        except (OSError, ValueError, EOFError):
            keys = None
        if keys is None or _name(keys) != name:
            raise UserError(f"{path}: is damaged, its bytes are not those that were written; {_REMEDY}")
        return keys

    def read(self, locations: Locations) -> NDArray[np.float32]:
        """Return ``(n, dimensions)`` embeddings, all of which must exist; up to 64 MiB of each file are checked."""
        vectors: NDArray[np.float32] | None = None
        for number in np.unique(locations.file).tolist():
            path = self.folder / (locations.names[number] + _VECTORS)
            check_file(path, _REMEDY)
            stored = np.load(path, mmap_mode="r")
            if vectors is None:
                vectors = np.empty((len(locations.file), stored.shape[1]), dtype=np.float32)
            own = np.flatnonzero(locations.file == number)
            vectors[own] = stored[locations.row[own]]
        assert vectors is not None
        return vectors


def _name(ids: Ids) -> str:
    """Return the file name of sorted ids, by which damaged ids are noticed."""
    return blake2b(ids.tobytes(), digest_size=16).hexdigest()


# Rows


class SourceRows(NamedTuple):
    """The rows of a source, by side."""

    ids: dict[str, Ids]  # of the distinct texts in the order of first occurrence
    numbers: dict[str, NDArray[np.int64]]  # (rows,) number of each row's text
    first: dict[str, NDArray[np.int64]]  # rows of first occurrence


def read_ids(files: Iterable[SourceFile], ids_of: Callable[[Iterable[str]], Ids]) -> dict[str, Ids]:
    """Read and check files, and return the ids of all their rows by side."""
    read: dict[str, list[Ids]] = {side: [np.zeros(0, dtype=ID)] for side in SIDES}
    for file in files:
        for batch in PublishedFile(file).batches(_BATCH_ROWS, raw=True):
            for side, parts in read.items():
                parts.append(ids_of(batch.columns[side]))
    return {side: np.concatenate(parts) for side, parts in read.items()}


def read_rows(source: Source) -> SourceRows:
    """Read and check a source; only its ids are held in memory."""
    found = {side: distinct(ids) for side, ids in read_ids(source.files, text_ids).items()}
    return SourceRows(*({side: found[side][part] for side in SIDES} for part in range(3)))


def distinct_texts(source: Source, side: str, first: NDArray[np.int64]) -> Iterator[str]:
    """Yield the texts of one side in the rows ``first``, which ascend."""
    row = 0
    for path in source.files:
        for batch in PublishedFile(path).batches(_BATCH_ROWS):
            own = first[np.searchsorted(first, row) : np.searchsorted(first, row + len(batch))]
            yield from (batch.columns[side][position] for position in (own - row).tolist())
            row += len(batch)


def positives(
    form: NDArray[np.int64], query: NDArray[np.int64], passage: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair each query with the passages of all rows whose query is a spelling of it, sorted by query.

    Args:
        form: ``(queries,)`` forms of queries.
        query: ``(rows,)`` numbers of queries.
        passage: ``(rows,)`` numbers of passages.

    Returns:
        ``(pairs,)`` numbers of queries and of passages.
    """
    forms, passages = np.unique(np.stack([form[query], passage]), axis=1)
    start, stop = (np.searchsorted(forms, form, side) for side in ("left", "right"))
    counts = stop - start
    position = np.arange(counts.sum()) + np.repeat(start + counts - np.cumsum(counts), counts)
    return np.repeat(np.arange(len(form)), counts), passages[position]


def write_mined(
    source: Source,
    path: Path,
    numbers: NDArray[np.int64],
    mined: NDArray[np.int64],
    passages: TextStore,
    *,
    keep_short: bool,
    replace: bool,
) -> dict[str, int]:
    """Write a source with its mined negatives, in the order of its rows and with all its other columns.

    Args:
        source: The source.
        path: The parquet file; it is not touched if no row is left.
        numbers: ``(rows,)`` numbers of the rows' queries.
        mined: ``(queries, negatives)`` numbers of passages, -1 where there are too few.
        passages: Their texts.
        keep_short: Keep rows with fewer negatives.
        replace: Drop the negatives that rows already have.

    Returns:
        Rows read, kept and dropped.
    """
    counts: Counter[str] = Counter(rows=0, kept=0, dropped=0)
    others: dict[str, pa.DataType] = {}
    for file in map(PublishedFile, source.files):
        known = {*SIDES, *file.negatives, *others}
        others |= {field.name: field.type for field in file.schema if field.name not in known}

    def tables() -> Iterator[pa.Table]:
        row = 0
        for file in map(PublishedFile, source.files):
            names = [] if replace else file.negatives
            for batch in file.record_batches(_BATCH_ROWS, all_columns=True):
                texts = passages.take(mined[numbers[row : row + len(batch)]])
                row += len(batch)
                existing = zip(*(batch.column(name).to_pylist() for name in names), strict=True)
                own = list(existing) if names else [()] * len(batch)
                filled = [_fill(*both, mined.shape[1]) for both in zip(own, texts, strict=True)]
                kept = [row for row, negatives in enumerate(filled) if keep_short or negatives[-1] is not None]
                counts.update(rows=len(batch), kept=len(kept), dropped=len(batch) - len(kept))
                if kept:
                    yield _table(batch.take(pa.array(kept)), [filled[row] for row in kept], others)

    found = tables()
    first = next(found, None)
    if first is not None:
        write_parquet(path, chain([first], found))
    return dict(counts)


def _fill(own: Sequence[str | None], mined: Sequence[str | None], negatives: int) -> list[str | None]:
    """Return a row's own negatives, then mined ones that are not spellings of them, then None."""
    texts = dict.fromkeys(text for text in own if text is not None)
    forms = set(map(normalise, texts))
    texts |= dict.fromkeys(text for text in mined if text is not None and not (forms and normalise(text) in forms))
    return [*texts, *[None] * negatives][:negatives]


def _table(batch: pa.RecordBatch, negatives: list[list[str | None]], others: Mapping[str, pa.DataType]) -> pa.Table:
    table = rows_table(*(batch.column(side).to_pylist() for side in SIDES), list(zip(*negatives, strict=True)))
    for name, kind in others.items():
        there = name in batch.schema.names
        table = table.append_column(name, batch.column(name).cast(kind) if there else pa.nulls(len(batch), kind))
    return table
