"""A teacher's embeddings of every text of the prepared sources: computed once, for all epochs and all students.

Each source has a folder, named after everything that the embeddings depend on: the teacher, the texts, how it was given
them and the precision. Embeddings of another teacher or of other data are therefore never found. It holds shards: raw
float16 matrices of the teacher's full width, for texts of neighbouring positions, each whole or absent. A pass that was
killed continues with the missing ones, and any number of processes may share the work: of two that need the same shard,
one waits for the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.command import operations, size
from training.common.errors import UserError
from training.common.outputs import check_file, locked, whole_file, write_whole
from training.config.arguments import StageArguments
from training.data.prepared import PreparedSource
from training.models.model_folder import forward_flops, user_error

# Texts of a shard: what a killed pass loses of each process.
_SHARD_TEXTS = 32_768
_DESCRIPTION = "cache.json"
# Blocks of 1 MiB that are read of a source's shards when they are checked, but one of each at least.
_CHECKED_BLOCKS = 64
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
        width: The teacher's width; None takes it from the cache.

    Attributes:
        width: The teacher's width ``D``; None if it was not given and the cache is empty.
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
        self._described = {
            source.name: {
                **made_by,
                "source": source.name,
                "fingerprint": source.description["fingerprint"],
                "texts": source.description["texts"],
            }
            for source in sources
        }
        self._folders = {name: self.folder / f"{name}-{_digest(each)}" for name, each in self._described.items()}
        widths = {self._stored_width(name) for name in self._sources} - {None}
        known = widths.pop() if len(widths) == 1 else None
        if None not in (width, known) and width != known:
            raise UserError(
                f"{folder}: holds embeddings of {known} dimensions, not {width}; delete them or give another"
            )
        self.width = known if width is None else width

    def _stored_width(self, source: str) -> int | None:
        path = self._folders[source] / _DESCRIPTION
        if not path.exists():
            return None
        with user_error(f"{path}: is damaged", "delete the folder, and it is computed again"):
            found = json.loads(path.read_text(encoding="utf-8"))
            width = found.pop("width")
            if _digest(found) != _digest(self._described[source]) or not isinstance(width, int):
                raise ValueError("it describes other embeddings")
            return width

    def _shards(self) -> Iterator[_Shard]:
        for name, source in self._sources.items():
            folder, texts = self._folders[name], source.description["texts"]
            for number, start in enumerate(range(0, texts, _SHARD_TEXTS)):
                yield _Shard(source, folder / f"{number:05d}.float16", start, min(start + _SHARD_TEXTS, texts))

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
        """Compare the shards with their checksums, in bounded time.

        Of a source at most 64 MiB are read, or 1 MiB of each shard if there are more than 64.
        """
        for shard in filter(self._is_whole, self._shards()):
            of_source = -(-shard.source.description["texts"] // _SHARD_TEXTS)
            blocks = max(1, _CHECKED_BLOCKS // of_source)
            check_file(shard.path, "delete it, and it is computed again", most_blocks=blocks)

    def fill(self, embed: Embed, rank: int = 0, world_size: int = 1) -> None:
        """Embed what is missing of this process's share; all processes of a machine or shared disk call it."""
        mine = [shard for number, shard in enumerate(self._shards()) if number % world_size == rank]
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
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        description = shard.path.parent / _DESCRIPTION
        if not description.exists():
            described = {**self._described[shard.source.name], "width": embeddings.shape[1]}
            with locked(description):
                write_whole(description, json.dumps(described, indent=2, sort_keys=True) + "\n")
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
            shard = _mapped(self._folders[source] / f"{number:05d}.float16", self.width)
            found[own] = shard[positions[own] - number * _SHARD_TEXTS, :width]
        return found


# Each map holds a file open, so a limited number stay.
@lru_cache(maxsize=256)
def _mapped(path: Path, width: int) -> np.ndarray:
    return np.memmap(path, "<f2", "r").reshape(-1, width)


def _digest(described: Mapping[str, Any]) -> str:
    return blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=8).hexdigest()


class TeacherPass(NamedTuple):
    """The cost of embedding all texts of a stage once, less what the cache already holds, which is not looked up."""

    texts: int
    tokens: int
    # On disk, in float16.
    bytes: int
    flops: float
    # Tokens that the student encodes in as many operations.
    student_tokens: float

    def described(self) -> str:
        """Return the cost in words."""
        return (
            f"embeds {self.texts:,} texts of {self.tokens:,} tokens once for all students, less what is there already: "
            f"{operations(self.flops)}, {size(self.bytes)} on disk"
        )


def teacher_pass(
    args: StageArguments, config: F2LLMConfig, teacher: F2LLMConfig | None, sources: Sequence[PreparedSource] | None
) -> TeacherPass | None:
    """Return the cost of filling a stage's cache; None without a cache, a known teacher or prepared sources."""
    if args.teacher_cache_dir is None or teacher is None or not sources:
        return None
    texts, tokens = (sum(source.description[what] for source in sources) for what in ("texts", "tokens"))
    # As if all texts had the same length: attention is a small part of the cost.
    squared = tokens**2 / max(texts, 1)
    flops, own = (forward_flops(each, tokens, squared) for each in (teacher, config))
    return TeacherPass(texts, tokens, 2 * texts * teacher.hidden_size, flops, tokens * flops / own)
