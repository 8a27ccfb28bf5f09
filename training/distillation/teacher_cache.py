"""A teacher's embeddings of every text of the prepared sources: computed once, for all epochs and all students.

Each source has a folder, named after everything that the embeddings depend on: the teacher, the texts, how it was given
them and the precision. Embeddings of another teacher or of other data are therefore never found. It holds shards: raw
float16 matrices of the teacher's full width, for texts of neighbouring positions, each whole or absent. A pass that was
killed continues with the missing ones, and any number of processes may share the work: of two that need the same shard,
one waits for the other.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm

from training.common.errors import UserError
from training.common.outputs import check_file, locked, whole_file, write_whole
from training.data.prepared import PreparedSource

# Texts of a shard: what a killed pass loses of each process.
_SHARD_TEXTS = 32_768
# What a source's embeddings depend on, written for people.
_DESCRIPTION = "cache.json"
# Of the machine's memory: a larger cache is read page by page.
_MEMORY_SHARE = 0.5
# Blocks of 1 MiB that are read of a source's shards when they are checked, but one of each at least.
_CHECKED_BLOCKS = 64
_REMEDY = "delete it, and it is computed again"
# (n,) positions of texts of a source -> (n, D) embeddings.
Embed = Callable[[PreparedSource, np.ndarray], Tensor]


class _Shard(NamedTuple):
    """Texts ``start`` to ``end`` (without) of a source."""

    source: PreparedSource
    path: Path
    start: int
    end: int


class TeacherCache:
    """The embeddings of one teacher, of ``width`` dimensions, by source and text position.

    Several teachers and sources may share the ``folder``. ``made_by`` is what an embedding depends on besides its text:
    identity of the teacher, precision, format of the text.
    """

    def __init__(
        self, folder: Path | str, sources: Sequence[PreparedSource], made_by: Mapping[str, Any], width: int
    ) -> None:
        self.width = width
        self._sources, self._described, self._folders = list(sources), {}, {}
        for source in sources:
            described = {**made_by, "source": source.name}
            described |= {name: source.description[name] for name in ("fingerprint", "texts")}
            digest = blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()
            self._described[source.name] = {**described, "width": width}
            self._folders[source.name] = Path(folder) / f"{source.name}-{digest}"
        # Around each page that is missing, the system reads 128 KiB. That soon has all of a cache in memory; of one
        # that is larger, every batch would read some sixty times what it needs.
        size = 2 * width * sum(source.description["texts"] for source in sources)
        self._by_page = size > _MEMORY_SHARE * psutil.virtual_memory().total

    def _shards(self) -> Iterator[_Shard]:
        for source in self._sources:
            folder, texts = self._folders[source.name], source.description["texts"]
            for number, start in enumerate(range(0, texts, _SHARD_TEXTS)):
                yield _Shard(source, folder / f"{number:05d}.float16", start, min(start + _SHARD_TEXTS, texts))

    def _is_whole(self, shard: _Shard) -> bool:
        if not shard.path.exists():
            return False
        expected, found = 2 * self.width * (shard.end - shard.start), shard.path.stat().st_size
        if found != expected:
            raise UserError(f"{shard.path}: is damaged ({found} bytes, not {expected}); {_REMEDY}")
        return True

    @property
    def whole(self) -> bool:
        """Whether every text of every source is there."""
        return all(self._is_whole(shard) for shard in self._shards())

    def check(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare a process's share of the shards with their checksums.

        All together read 64 MiB of a source, or 1 MiB of each shard if it has more.
        """
        for shard in filter(self._is_whole, islice(self._shards(), rank, None, world_size)):
            of_source = -(-shard.source.description["texts"] // _SHARD_TEXTS)
            check_file(shard.path, _REMEDY, most_blocks=max(1, _CHECKED_BLOCKS // of_source))

    def fill(self, embed: Embed, rank: int = 0, world_size: int = 1) -> None:
        """Embed what is missing of this process's share; all processes of a machine or shared disk call it."""
        mine = islice(self._shards(), rank, None, world_size)
        missing = [shard for shard in mine if not self._is_whole(shard)]
        texts = sum(shard.end - shard.start for shard in missing)
        with tqdm(total=texts, desc="teacher", unit="text", disable=True if rank or not texts else None) as bar:
            for shard in missing:
                with locked(shard.path):
                    # Another run that shares the folder may have made it by now.
                    if not self._is_whole(shard):
                        self._write(shard, embed(shard.source, np.arange(shard.start, shard.end)))
                bar.update(shard.end - shard.start)

    def _write(self, shard: _Shard, embeddings: Tensor) -> None:
        half = embeddings.to("cpu", torch.float16)
        if not half.isfinite().all():
            largest = embeddings.abs().max().item()
            raise UserError(
                f"the teacher's embeddings of source {shard.source.name!r} do not fit float16 (largest {largest:.3g}); "
                "leave out 'teacher_cache_dir', or check the teacher"
            )
        description = shard.path.with_name(_DESCRIPTION)
        description.parent.mkdir(parents=True, exist_ok=True)
        if not description.exists():
            with locked(description):
                content = json.dumps(self._described[shard.source.name], indent=2, sort_keys=True)
                write_whole(description, content + "\n")
        with whole_file(shard.path, checksums=True) as partial, partial.open("wb") as handle:
            handle.write(half.numpy().astype("<f2").tobytes())
            handle.flush()
            # Renamed before its content is on disk, a shard could come out of a power failure as zeros.
            os.fsync(handle.fileno())

    def read(self, source: str, positions: np.ndarray, width: int) -> np.ndarray:
        """``(n, width)`` float16: the leading dimensions of the embeddings of some texts."""
        found = np.empty((len(positions), width), dtype=np.float16)
        numbers = positions // _SHARD_TEXTS
        for number in np.unique(numbers).tolist():
            own = np.flatnonzero(numbers == number)
            shard = _mapped(self._folders[source] / f"{number:05d}.float16", self.width, self._by_page)
            rows = positions[own] - number * _SHARD_TEXTS
            if self._by_page:
                _ask_for(shard, rows, width)
            found[own] = shard[rows, :width]
        return found


# Each map holds a file open, so a limited number stay.
@lru_cache(maxsize=256)
def _mapped(path: Path, width: int, by_page: bool) -> np.memmap:
    shard = np.memmap(path, "<f2", "r").reshape(-1, width)
    if by_page and hasattr(mmap, "MADV_RANDOM"):
        shard._mmap.madvise(mmap.MADV_RANDOM)
    return shard


def _ask_for(shard: np.memmap, rows: np.ndarray, width: int) -> None:
    """Let the system read the leading dimensions of rows at once rather than one page after the other."""
    if hasattr(mmap, "MADV_WILLNEED"):
        for start in (rows * shard.strides[0]).tolist():
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            shard._mmap.madvise(mmap.MADV_WILLNEED, page, start + 2 * width - page)
