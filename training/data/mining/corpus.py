"""The texts of a source, as numbers: ids, texts and arrays on disk, and cached embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.common.errors import UserError
from training.common.outputs import check_file, locked, whole_file, write_whole
from training.data.cleaning.normalise import normalise
from training.data.manifest import Source
from training.data.published import PublishedFile
from training.data.storage import SourceFile

SIDES = ("query", "passage")
# Texts that are stored, embedded and cached together: what a killed run loses at most.
CHUNK_TEXTS = 8192
# 128 bits of a text's hash. numpy sorts and compares such bytes; ignoring zeros at the end is harmless at equal length.
ID = np.dtype("S16")
Ids = NDArray[np.bytes_]

_BATCH_ROWS = 8192
_TEXT_SCHEMA = pa.schema([("text", pa.large_string())])


def text_ids(texts: Iterable[str]) -> Ids:
    """Return ``(n,)`` ids; two of a thousand million texts have the same id with a probability of 1 in 10^21."""
    digests = b"".join(blake2b(text.encode(), digest_size=ID.itemsize).digest() for text in texts)
    return np.frombuffer(digests, dtype=ID)


def form_ids(texts: Iterable[str]) -> Ids:
    """Return ``(n,)`` ids of the normalised texts, which are equal for spellings of one text."""
    return text_ids(map(normalise, texts))


class Numbered(NamedTuple):
    """The texts of one side of a source, numbered in the order of their first occurrence."""

    ids: Ids  # (texts,)
    numbers: NDArray[np.int64]  # (pairs,) number of each pair's text
    first: NDArray[np.int64]  # (texts,) pairs of first occurrence, ascending


def numbered(ids: Ids) -> Numbered:
    """Number the distinct ids among those of all pairs."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return Numbered(ids[first[order]], np.argsort(order)[inverse], first[order])


def find(ids: Ids, among: Ids) -> NDArray[np.int64]:
    """Return ``(n,)`` positions of ids in a sorted array of distinct ids, -1 for missing ones."""
    if not len(among):
        return np.full(len(ids), -1, dtype=np.int64)
    at = np.minimum(np.searchsorted(among, ids), len(among) - 1)
    return np.where(among[at] == ids, at, -1)


class PairBatch(NamedTuple):
    """Each query of some rows with each of its positives, in the order of rows, then of columns."""

    query: list[str]
    passage: list[str]
    document: list[str | None]  # the id that the data gives the passage
    first: list[bool]  # whether a row starts here


def pair_batches(files: Iterable[SourceFile], raw: bool = False) -> Iterator[PairBatch]:
    """Read and check files. Queries come without instructions if ``raw``."""
    for file in map(PublishedFile, files):
        for batch in file.batches(_BATCH_ROWS, raw=raw):
            nothing = [None] * len(batch)
            sides = [(batch.columns[name], batch.columns.get(f"{name}_id", nothing)) for name in file.positives]
            found = [
                (query, texts[row], ids[row], number == 0)
                for row, query in enumerate(batch.columns["query"])
                for number, (texts, ids) in enumerate(sides)
                if texts[row] is not None
            ]
            yield PairBatch(*map(list, zip(*found, strict=True)))


class PairIds(NamedTuple):
    """What is known of all pairs of queries and positives; several positives of a row are several pairs."""

    query: Ids  # (pairs,)
    passage: Ids  # (pairs,)
    document: Ids  # (pairs,) of the id that the data gives the passage; empty without one
    first: NDArray[np.bool_]  # (pairs,) whether a row starts here


def read_ids(files: Iterable[SourceFile], ids_of: Callable[[Iterable[str]], Ids]) -> PairIds:
    """Read and check files, and return the ids of their texts and documents."""
    parts = [PairIds(*np.zeros((3, 0), dtype=ID), np.zeros(0, dtype=bool))]
    for batch in pair_batches(files, raw=True):
        named = np.array([name is not None for name in batch.document])
        document = np.zeros(len(named), dtype=ID)
        document[named] = text_ids(name for name in batch.document if name is not None)
        parts.append(PairIds(ids_of(batch.query), ids_of(batch.passage), document, np.array(batch.first)))
    return PairIds(*map(np.concatenate, zip(*parts, strict=True)))


def join_documents(form: NDArray[np.int64], passage_form: NDArray[np.int64], document: Ids) -> NDArray[np.int64]:
    """Return the numbers of forms, ``(texts,)``, equal for the forms of one document.

    Passages with these forms, ``(pairs,)``, have the ids of documents ``(pairs,)``, which are empty without one.
    """
    named = document != b""
    if not named.any():
        return form
    number = np.unique(document[named], return_inverse=True)[1] + form.max() + 1
    graph = coo_array((np.ones(len(number), dtype=bool), (passage_form[named], number)), shape=(number.max() + 1,) * 2)
    return connected_components(graph, directed=False)[1].astype(np.int64)[form]


def distinct_texts(source: Source, side: str, first: NDArray[np.int64]) -> Iterator[str]:
    """Yield the texts of one side in the pairs ``first`` (ascending)."""
    pair = 0
    for batch in pair_batches(source.files):
        texts = getattr(batch, side)
        own = first[np.searchsorted(first, pair) : np.searchsorted(first, pair + len(texts))]
        yield from (texts[position] for position in (own - pair).tolist())
        pair += len(texts)


class TextStore:
    """Texts by number, in a memory-mapped Arrow file with batches of ``CHUNK_TEXTS``."""

    def __init__(self, path: Path) -> None:
        check_file(path, f"delete {path.parent}, and it is mined again")
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    @staticmethod
    def write(path: Path, texts: Iterator[str]) -> None:
        """Write texts as they come."""
        with whole_file(path, checksums=True) as partial, pa.ipc.new_file(str(partial), _TEXT_SCHEMA) as writer:
            while chunk := list(islice(texts, CHUNK_TEXTS)):
                writer.write_batch(pa.record_batch([pa.array(chunk, type=pa.large_string())], schema=_TEXT_SCHEMA))

    def __iter__(self) -> Iterator[str]:
        for number in range(self._reader.num_record_batches):
            yield from self._reader.get_batch(number).column(0).to_pylist()

    def take(self, numbers: NDArray[np.integer]) -> NDArray[np.object_]:
        """Return the texts of numbers in an array of the same shape; None for -1."""
        wanted, inverse = np.unique(numbers, return_inverse=True)
        known = wanted[wanted >= 0]
        texts: list[str | None] = [None] * (len(wanted) - len(known))
        # Chunk by chunk: to take from a whole column, pyarrow copies it.
        for chunk in np.unique(known // CHUNK_TEXTS).tolist():
            start, stop = np.searchsorted(known, [chunk * CHUNK_TEXTS, (chunk + 1) * CHUNK_TEXTS])
            column = self._reader.get_batch(chunk).column(0)
            texts += column.take(pa.array(known[start:stop] - chunk * CHUNK_TEXTS)).to_pylist()
        return np.array(texts, dtype=object)[inverse.reshape(numbers.shape)]


def save_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays to one ``.npz`` file with CRC-32; it is complete or absent."""
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_arrays(path: Path, *names: str) -> list[NDArray[Any]]:
    """Read arrays of a file, which is refused if its bytes are not those that were written."""
    try:
        with np.load(path) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it, and its content is computed again") from None


class EmbeddingCache:
    """Embeddings by the id of the text, in a folder that is named after ``made_by``: all else that they depend on."""

    def __init__(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        description = json.dumps({**made_by, "dtype": "float32"}, sort_keys=True, indent=2)
        self.folder = folder / blake2b(description.encode(), digest_size=16).hexdigest()
        path = self.folder / "embeddings.json"
        # A finished cache may lie on a read-only disk.
        if not path.is_file():
            with locked(path):
                write_whole(path, description)

    def add(self, ids: Ids, vectors: NDArray[np.floating]) -> None:
        """Store ``(n, dimensions)`` embeddings of ``(n,)`` ids."""
        path = self.folder / f"{blake2b(ids.tobytes(), digest_size=16).hexdigest()}.npz"
        with locked(path):
            save_arrays(path, ids=ids, vectors=vectors.astype(np.float32))

    def locate(self, ids: Ids) -> Located:
        """Look up distinct ids."""
        paths = sorted(self.folder.glob("[!.]*.npz"))
        order = np.argsort(ids)
        wanted, file, row = ids[order], *np.full((2, len(ids)), -1, dtype=np.int32)
        for number, path in enumerate(paths):
            at = find(*load_arrays(path, "ids"), wanted)
            found = np.flatnonzero(at >= 0)
            file[order[at[found]]], row[order[at[found]]] = number, found
        return Located(paths, file, row)


@dataclass(frozen=True)
class Located:
    """Where the embeddings of some texts are stored."""

    paths: list[Path]
    file: NDArray[np.int32]  # (n,) indices into paths; -1 for missing embeddings
    row: NDArray[np.int32]  # (n,)

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Return the ``(stop - start, dimensions)`` embeddings of a range of texts, all of which must exist."""
        file, row = self.file[start:stop], self.row[start:stop]
        vectors: NDArray[np.float32] | None = None
        for number in np.unique(file).tolist():
            (stored,) = load_arrays(self.paths[number], "vectors")
            if vectors is None:
                vectors = np.empty((len(file), stored.shape[1]), dtype=np.float32)
            vectors[file == number] = stored[row[file == number]]
        return vectors
