"""A teacher's embeddings of every text of the prepared sources: computed once, for all epochs and all students.

Each source has a folder of its own, named after everything that the embeddings depend on: the teacher, the texts, how
they were put to it and the precision. Embeddings of another teacher or of other data are therefore never found. In it
lie shards: raw float16 matrices of the teacher's full width, for texts of neighbouring positions, each whole or absent.
A pass that was killed goes on with those that are missing, and any number of processes may share the work: of two that
need the same shard, one waits for the other.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from training.common.checksums import check_file, write_checksums
from training.common.errors import UserError
from training.common.outputs import locked
from training.common.run_folder import write_whole
from training.data.prepared import PreparedSource

# Texts of a shard: what a killed pass loses of each process.
_SHARD_TEXTS = 32_768
_DESCRIPTION = "cache.json"
# Blocks of 1 MiB that are read of a source's shards when they are checked, but one of each at least.
_CHECKED_BLOCKS = 64
# Maps that stay open in a process.
_MOST_MAPS = 256

# (n,) positions of texts of a source -> (n, D) embeddings.
Embed = Callable[[PreparedSource, np.ndarray], Tensor]


class _Shard(NamedTuple):
    """Texts ``start`` to ``end`` (without) of a source."""

    source: PreparedSource
    path: Path
    start: int
    end: int


class TeacherCache:
    """The embeddings of one teacher, by source and text position.

    Args:
        folder: The folder of all caches; several teachers and sources may share it.
        sources: The prepared sources.
        made_by: What an embedding depends on besides its text: identity of the teacher, precision, format of the text.
        width: The teacher's width; None takes it from what is there.

    Attributes:
        width: The teacher's width ``D``; None if it was not given and nothing is there yet.

    Raises:
        UserError: If the folder cannot be written or holds a cache that says something else than its name.
    """

    def __init__(
        self,
        folder: Path | str,
        sources: Sequence[PreparedSource],
        made_by: Mapping[str, Any],
        width: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._sources = {source.name: source for source in sources}
        self._described = {source.name: _describe(source, made_by) for source in sources}
        self._maps: OrderedDict[Path, np.ndarray] = OrderedDict()
        known = self._known_width()
        if None not in (width, known) and width != known:
            raise UserError(
                f"{folder}: holds embeddings of {known} dimensions, not {width}; delete them or give another"
            )
        self.width = known if width is None else width

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map holds the whole array: a loader worker opens the files instead.
        return {**self.__dict__, "_maps": OrderedDict()}

    def _home(self, source: str) -> Path:
        digest = blake2b(self._described[source].encode(), digest_size=8).hexdigest()
        return self.folder / f"{source}-{digest}"

    def _known_width(self) -> int | None:
        widths = {self._read_description(name).get("width") for name in self._sources} - {None}
        return widths.pop() if len(widths) == 1 else None

    def _read_description(self, source: str) -> dict[str, Any]:
        path = self._home(source) / _DESCRIPTION
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            width = found.pop("width")
            if found != json.loads(self._described[source]) or not isinstance(width, int):
                raise ValueError("it describes other embeddings")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: is damaged ({error}); delete the folder, and it is computed again") from None
        return {**found, "width": width}

    def _shard_path(self, source: str, number: int) -> Path:
        return self._home(source) / f"{number:05d}.float16"

    def _shards(self) -> Iterator[_Shard]:
        for name, source in self._sources.items():
            texts = source.description["texts"]
            for number, start in enumerate(range(0, texts, _SHARD_TEXTS)):
                yield _Shard(source, self._shard_path(name, number), start, min(start + _SHARD_TEXTS, texts))

    def _is_whole(self, shard: _Shard) -> bool:
        if self.width is None or not shard.path.exists():
            return False
        expected, found = 2 * self.width * (shard.end - shard.start), shard.path.stat().st_size
        if found != expected:
            raise UserError(
                f"{shard.path}: is damaged ({found} bytes, not {expected}); delete it, and it is computed again"
            )
        return True

    @property
    def whole(self) -> bool:
        """Whether every text of every source is there."""
        return self.width is not None and all(self._is_whole(shard) for shard in self._shards())

    def check(self) -> None:
        """Compares the shards that are there with what was written, in bounded time.

        Of a source 64 MiB are read at most, or 1 MiB of each shard if there are more than 64.

        Raises:
            UserError: If one is damaged.
        """
        for shard in self._shards():
            if self._is_whole(shard):
                of_source = -(-shard.source.description["texts"] // _SHARD_TEXTS)
                remedy = "delete it, and it is computed again"
                check_file(shard.path, remedy, most_blocks=max(1, _CHECKED_BLOCKS // of_source))

    @property
    def missing_texts(self) -> int:
        """Texts that are still to be embedded."""
        return sum(shard.end - shard.start for shard in self._shards() if not self._is_whole(shard))

    def fill(self, embed: Embed, rank: int = 0, world_size: int = 1) -> None:
        """Embeds what is missing of this process's share; all processes of a machine or shared disk call it.

        Args:
            embed: Gives ``(n, D)`` embeddings of ``(n,)`` positions of a source.
            rank: This process.
            world_size: Processes that share the work.

        Raises:
            UserError: If an embedding is NaN, infinite or too large for float16.
            OSError: If the disk is full or the folder cannot be written; whole shards stay.
        """
        mine = [shard for number, shard in enumerate(self._shards()) if number % world_size == rank]
        missing = [shard for shard in mine if not self._is_whole(shard)]
        texts = sum(shard.end - shard.start for shard in missing)
        with tqdm(total=texts, desc="teacher", unit="text", disable=True if rank or not texts else None) as bar:
            for shard in missing:
                with locked(shard.path):
                    # Another run that shares the folder may have made it by now.
                    if not self._is_whole(shard):
                        embeddings = embed(shard.source, np.arange(shard.start, shard.end))
                        self._write(shard, embeddings)
                bar.update(shard.end - shard.start)

    def _write(self, shard: _Shard, embeddings: Tensor) -> None:
        half = embeddings.to("cpu", torch.float16)
        if not half.isfinite().all():
            largest = embeddings.abs().max().item()
            raise UserError(
                f"the teacher's embeddings of source {shard.source.name!r} do not fit float16 (largest {largest:.3g}); "
                "leave out 'teacher_cache_dir', or check the teacher"
            )
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        described = {**json.loads(self._described[shard.source.name]), "width": embeddings.shape[1]}
        description = shard.path.parent / _DESCRIPTION
        if not description.exists():
            with locked(description):
                write_whole(description, json.dumps(described, indent=2, sort_keys=True) + "\n")
        partial = shard.path.with_name(f".{shard.path.name}.partial")
        try:
            with partial.open("wb") as handle:
                handle.write(half.numpy().astype("<f2").tobytes())
                handle.flush()
                # Renamed before its content is on disk, a shard could come out of a power failure as zeros.
                os.fsync(handle.fileno())
            # First: whoever finds the shard finds its checksums.
            write_checksums(shard.path, partial)
            partial.replace(shard.path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, source: str, positions: np.ndarray, width: int) -> np.ndarray:
        """``(n, width)`` float16: the leading dimensions of the embeddings of some texts.

        Args:
            source: Name of the source.
            positions: ``(n,)`` positions of texts; the cache must be whole.
            width: Leading dimensions, ``D`` at most.
        """
        found = np.empty((len(positions), width), dtype=np.float16)
        numbers = positions // _SHARD_TEXTS
        for number in np.unique(numbers).tolist():
            own = np.flatnonzero(numbers == number)
            found[own] = self._opened(source, number)[positions[own] - number * _SHARD_TEXTS, :width]
        return found

    def _opened(self, source: str, number: int) -> np.ndarray:
        """A shard, mapped; each map holds a file open, so no more than some stay."""
        path = self._shard_path(source, number)
        if path not in self._maps:
            start = number * _SHARD_TEXTS
            texts = min(_SHARD_TEXTS, self._sources[source].description["texts"] - start)
            self._maps[path] = np.memmap(path, "<f2", "r", shape=(texts, self.width))
            if len(self._maps) > _MOST_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(path)
        return self._maps[path]


def _describe(source: PreparedSource, made_by: Mapping[str, Any]) -> str:
    of_source = {"source": source.name, "fingerprint": source.description["fingerprint"]}
    return json.dumps({**made_by, **of_source, "texts": source.description["texts"]}, sort_keys=True)
