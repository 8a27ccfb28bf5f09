"""Runs: distinct texts of a shard on disk, cut by partition of their hashes, so that a partition is read by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

_SCHEMA = pa.schema({"hash": pa.uint64(), "text": pa.large_string()})
# Characters held before they go to disk, and hashes remembered so that a text goes there once.
_RUN_CHARACTERS = 24_000_000
_MOST_SEEN = 1_000_000


def partition_of(hashes: np.ndarray, partitions: int) -> np.ndarray:
    """Partition of each hash, by its highest bits: partitions are neighbouring ranges of hashes."""
    bits = partitions.bit_length() - 1
    return (hashes >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(hashes), dtype=np.int64)


class RunWriter:
    """Collects texts with their hashes and writes a run whenever enough have come together.

    A run is an Arrow file of one record batch per partition. A text may be in several runs; reading makes it one.
    """

    def __init__(self, folder: Path, partitions: int) -> None:
        self._folder, self._partitions = folder, partitions
        self._hashes: list[np.ndarray] = []
        self._texts: list[str] = []
        self._characters = self._written = 0
        self._seen = np.zeros((0, 2), dtype=np.uint64)

    def __enter__(self) -> RunWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            # Left by a task that was killed.
            path.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()

    def add(self, keys: np.ndarray, texts: Sequence[str]) -> None:
        """Adds distinct texts; those that were added not long ago are left out.

        Args:
            keys: ``(n, 2)`` hashes of the texts, and further bits of each.
            texts: ``n`` texts.
        """
        new = np.flatnonzero(~_contains(self._seen, keys))
        if not len(new):
            return
        self._hashes.append(keys[new, 0])
        self._texts += [texts[i] for i in new]
        self._characters += sum(len(texts[i]) for i in new)
        recent = keys[new][np.argsort(keys[new, 0])]
        seen = np.concatenate([self._seen, recent])
        # The stable sort merges two sorted parts in one pass.
        self._seen = seen[np.argsort(seen[:, 0], kind="stable")] if len(seen) <= _MOST_SEEN else recent
        if self._characters >= _RUN_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        hashes = np.concatenate(self._hashes)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        # A query's form may be a document's too.
        first = np.append(True, hashes[1:] != hashes[:-1])
        repeated = ~first
        if repeated.any():
            first |= self._other_texts(order, repeated)
        table = pa.record_batch(
            [pa.array(hashes[first]), pa.array([self._texts[i] for i in order[first]], type=pa.large_string())],
            schema=_SCHEMA,
        )
        ends = np.searchsorted(partition_of(hashes[first], self._partitions), np.arange(self._partitions + 1))
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        path = self._folder / f"{self._written:05d}.arrow"
        with pa.ipc.new_file(path, _SCHEMA, options=options) as writer:
            for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                writer.write_batch(table.slice(start, end - start))
        self._hashes, self._texts, self._characters = [], [], 0
        self._written += 1

    def _other_texts(self, order: np.ndarray, repeated: np.ndarray) -> np.ndarray:
        """Where a repeated hash belongs to another text than the one before it, which reading will refuse."""
        other = np.zeros(len(order), dtype=bool)
        for i in np.flatnonzero(repeated):
            other[i] = self._texts[order[i]] != self._texts[order[i - 1]]
        return other


def _contains(seen: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether each of ``(n, 2)`` keys is among those seen, which ascend by their hashes.

    Of several texts of one hash the first is known again; the others go to disk each time, for reading to refuse them.
    """
    places = np.searchsorted(seen[:, 0], keys[:, 0])
    found = places < len(seen)
    found[found] = (seen[places[found]] == keys[found]).all(axis=1)
    return found


def read_partition(folders: Sequence[Path], partition: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yields hashes and texts of one partition, run by run."""
    for folder in folders:
        for path in sorted(folder.glob("*.arrow")):
            with pa.memory_map(str(path)) as source:
                batch = pa.ipc.open_file(source).get_batch(partition)
                yield np.array(batch.column("hash"), dtype=np.uint64), batch.column("text").to_pylist()
