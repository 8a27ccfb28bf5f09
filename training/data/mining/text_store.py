"""Texts on disk by number: an Arrow file that is mapped into memory, so that it may be larger than it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.common.checksums import check_file, write_checksums

# Texts that are written, embedded and cached together: what a killed run loses at most.
CHUNK_TEXTS = 8192
_SCHEMA = pa.schema([("text", pa.large_string())])


class TextStore:
    """Texts numbered from 0, in chunks of ``CHUNK_TEXTS``.

    Args:
        path: A file that :meth:`write` wrote.

    Raises:
        UserError: If the file is damaged; 64 MiB of it are compared with what was written.
    """

    def __init__(self, path: Path) -> None:
        check_file(path, f"delete {path.parent}, and it is mined again")
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    @staticmethod
    def write(path: Path, texts: Iterable[str]) -> None:
        """Writes texts as they come; the file is whole or absent."""
        partial = path.with_name(f".{path.name}.partial")
        with pa.ipc.new_file(str(partial), _SCHEMA) as writer:
            for chunk in _chunks(texts):
                writer.write_batch(pa.record_batch([pa.array(chunk, type=pa.large_string())], schema=_SCHEMA))
        write_checksums(path, partial)
        partial.replace(path)

    def chunk(self, number: int) -> pa.Array:
        """The texts from ``number * CHUNK_TEXTS`` on."""
        return self._reader.get_batch(number).column(0)

    def chunks(self) -> Iterator[list[str]]:
        """Yields all texts in order, chunk by chunk."""
        for number in range(self._reader.num_record_batches):
            yield self.chunk(number).to_pylist()

    def take(self, numbers: NDArray[np.integer]) -> NDArray[np.object_]:
        """Texts of the numbers, in an array of the same shape; None for -1."""
        wanted, inverse = np.unique(numbers, return_inverse=True)
        texts = np.full(len(wanted), None, dtype=object)
        start = np.searchsorted(wanted, 0)
        for chunk in np.unique(wanted[start:] // CHUNK_TEXTS).tolist():
            stop = np.searchsorted(wanted, (chunk + 1) * CHUNK_TEXTS)
            own = wanted[start:stop] - chunk * CHUNK_TEXTS
            texts[start:stop] = self.chunk(chunk).take(pa.array(own)).to_pylist()
            start = stop
        return texts[inverse.reshape(numbers.shape)]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while chunk := list(islice(texts, CHUNK_TEXTS)):
        yield chunk
