"""The tasks of mining one source: embedding its texts and searching its passages, in units that any worker can do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from training.common.checksums import check_file, write_checksums
from training.data.mining.embedding_cache import EmbeddingCache, Locations
from training.data.mining.index import ShardIndex
from training.data.mining.rows import SIDES
from training.data.mining.rules import RULES, MiningOptions
from training.data.mining.search import BlockSearch
from training.data.mining.text_store import CHUNK_TEXTS, TextStore

# Queries whose candidates are in memory together.
BLOCK_QUERIES = 16_384


class Miner(Protocol):
    """A pinned embedding model, as :class:`training.models.miner.Miner`; ``model`` is a folder or a Hub name."""

    model: str
    revision: str

    def made_by(self) -> dict[str, Any]:
        """What embeddings depend on, for the key of their cache."""

    def embed_queries(self, texts: Sequence[str], instruction: str | None) -> NDArray[np.float32]:
        """``(len(texts), dimensions)`` of unit length."""

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``(len(texts), dimensions)`` of unit length."""


@dataclass(frozen=True)
class MiningTasks:
    """What workers need to mine a source; everything large lies in the folder.

    Attributes:
        name: The source's name.
        folder: Texts, arrays by name and results; all workers must see it.
        cache: The folder of cached embeddings.
        miner: The model.
        instruction: What queries are embedded under; None for the model's own prompt.
        options: The thresholds.
        window: Candidates a query that the rules see.
        shard_texts: Passages whose embeddings are in memory together.
        search: ``faiss`` or ``torch``.
        half: Embeddings are cached in 16 bits.
        tasks: Tasks that the work is dealt out to.
    """

    name: str
    folder: Path
    cache: Path
    miner: Miner
    instruction: str | None
    options: MiningOptions
    window: int
    shard_texts: int
    search: str
    half: bool
    tasks: int

    # Arrays by name

    def save(self, name: str, array: NDArray[Any]) -> None:
        """Writes an array; the file is whole or absent."""
        path, partial = self.folder / f"{name}.npy", self.folder / f".{name}.partial.npy"
        np.save(partial, array)
        write_checksums(path, partial)
        partial.replace(path)

    def load(self, name: str) -> NDArray[Any]:
        """Maps an array into memory.

        Raises:
            UserError: If the file is damaged; 64 MiB of it are compared with what was written.
        """
        path = self.folder / f"{name}.npy"
        check_file(path, f"delete {self.folder}, and it is mined again")
        return np.load(path, mmap_mode="r")

    def texts(self, side: str) -> TextStore:
        """The distinct queries or passages."""
        return TextStore(self.folder / f"{side}.arrow")

    # Embedding

    def embedding_cache(self, side: str) -> EmbeddingCache:
        """Where the embeddings of queries or passages are."""
        made_by = {"role": side, **self.miner.made_by()}
        if side == "query":
            made_by["instruction"] = self.instruction
        return EmbeddingCache(self.cache, made_by, self.half)

    def embed(self, task: int) -> None:
        """Embeds every ``tasks``-th chunk of texts that are not cached.

        Chunks do not depend on shards, workers or tasks: neither do the batches, nor so the last bits of embeddings.
        """
        counts = dict.fromkeys(("embedded", "cached"), 0)
        for side in SIDES:
            ids, cache, store = self.load(f"{side}_ids"), self.embedding_cache(side), self.texts(side)
            mine = np.arange(len(ids)) // CHUNK_TEXTS % self.tasks == task
            numbers = np.flatnonzero(mine)
            missing = numbers[cache.locate(ids[numbers]).file < 0]
            counts["cached"] += len(numbers) - len(missing)
            counts["embedded"] += len(missing)
            with self._bar(len(missing), f"embed {side}", "text", task) as bar:
                chunks = np.split(missing, np.flatnonzero(np.diff(missing // CHUNK_TEXTS)) + 1)
                for own in chunks if len(missing) else []:
                    cache.add(ids[own], self._embed(side, store.take(own).tolist()))
                    bar.update(len(own))
        (self.folder / f"embedded-{self.tasks}-{task:05d}.json").write_text(json.dumps(counts))

    def _embed(self, side: str, texts: list[str]) -> NDArray[np.float32]:
        if side == "query":
            return self.miner.embed_queries(texts, self.instruction)
        return self.miner.embed_passages(texts)

    def locate(self) -> bool:
        """Notes where each embedding lies, once for all tasks that read them; False if some are nowhere."""
        whole = True
        for side in SIDES:
            names, file, row = self.embedding_cache(side).locate(self.load(f"{side}_ids"))
            (self.folder / f"{side}_files.json").write_text(json.dumps(names))
            self.save(f"{side}_file", file)
            self.save(f"{side}_row", row)
            whole &= bool((file >= 0).all())
        return whole

    def _reader(self, side: str) -> Callable[[int, int], NDArray[np.float32]]:
        """A function that reads the embeddings of a range of numbers."""
        names = json.loads((self.folder / f"{side}_files.json").read_text())
        file, row, cache = self.load(f"{side}_file"), self.load(f"{side}_row"), self.embedding_cache(side)
        return lambda start, stop: cache.read(Locations(names, file[start:stop], row[start:stop]))

    # Search

    @property
    def blocks(self) -> int:
        """Number of blocks of queries."""
        return -(-len(self.load("query_ids")) // BLOCK_QUERIES)

    def search_blocks(self, task: int) -> None:
        """Chooses the negatives of every ``tasks``-th block of queries."""
        queries, passages = len(self.load("query_ids")), len(self.load("passage_ids"))
        left = [block for block in range(task, self.blocks, self.tasks) if not self.result(block).exists()]
        spans = [(block * BLOCK_QUERIES, min((block + 1) * BLOCK_QUERIES, queries)) for block in left]
        shards = range(0, passages, self.shard_texts)
        total = sum(stop - start for start, stop in spans) * len(shards)
        index: ShardIndex | None = None
        with self._bar(total, "search", "query", task) as bar:
            for block, (start, stop) in zip(left, spans, strict=True):
                vectors = self._reader("query")(start, stop)
                search = BlockSearch(self.load, vectors, start, self.window, self.options)
                for first in shards:
                    if index is None or index.first != first:
                        index = None  # Before the next one is read: two need not fit.
                        index = self._shard(first, min(first + self.shard_texts, passages))
                    search.add(index, bar)
                self._write_result(block, *search.choose())

    def _shard(self, first: int, stop: int) -> ShardIndex:
        return ShardIndex(self._reader("passage")(first, stop), first, self.load("passage_rank"), self.search)

    def result(self, block: int) -> Path:
        """The file of a block's negatives."""
        return self.folder / f"negatives-{block:05d}.npy"

    def _write_result(self, block: int, negatives: NDArray[np.int64], counts: dict[str, int]) -> None:
        (self.folder / f"refused-{block:05d}.json").write_text(json.dumps(counts))
        self.save(f"negatives-{block:05d}", negatives)

    def _bar(self, total: int, what: str, unit: str, task: int) -> tqdm:
        return tqdm(total=total, desc=f"{self.name}: {what}", unit=unit, position=task, disable=None if total else True)

    # Results

    def negatives(self) -> NDArray[np.int64]:
        """``(queries, negatives)`` numbers of passages."""
        return np.concatenate([self.load(self.result(block).stem) for block in range(self.blocks)])

    def counts(self) -> dict[str, Any]:
        """Texts embedded and cached, candidates refused by each rule."""
        embedded = _sum(self.folder.glob(f"embedded-{self.tasks}-*.json"), ("embedded", "cached"))
        return {"texts": embedded, "refused": _sum(self.folder.glob("refused-*.json"), RULES)}


def _sum(paths: Iterable[Path], keys: Iterable[str]) -> dict[str, int]:
    total = dict.fromkeys(keys, 0)
    for path in paths:
        for key, count in json.loads(path.read_text()).items():
            total[key] += count
    return total
