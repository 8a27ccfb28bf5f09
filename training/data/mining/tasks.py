"""The tasks of mining one source: embed its texts, then search its passages, in units that any worker can do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from training.common.outputs import check_file
from training.data.manifest import Source
from training.data.mining.corpus import (
    CHUNK_TEXTS,
    SIDES,
    EmbeddingCache,
    Locations,
    SourceRows,
    TextStore,
    distinct,
    distinct_texts,
    form_ids,
    positives,
    save_array,
)
from training.data.mining.search import (
    RULES,
    MiningOptions,
    Nearest,
    Relations,
    ShardIndex,
    Translations,
    choose_negatives,
    merge,
    pair_scores,
)

# Queries whose candidates are in memory together.
BLOCK_QUERIES = 16_384
# Positives whose scores are computed at once.
_PAIRS = 1024


class Miner(Protocol):
    """A pinned embedding model, as :class:`training.models.encoders.Miner`; vectors have unit length."""

    model: str
    revision: str

    def made_by(self) -> dict[str, Any]:
        """Return what embeddings depend on, for the key of their cache."""

    def embed_queries(self, texts: Sequence[str], instruction: str | None) -> NDArray[np.float32]:
        """Return ``(len(texts), dimensions)``."""

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return ``(len(texts), dimensions)``."""


@dataclass(frozen=True)
class MiningTasks:
    """What workers need to mine a source."""

    name: str
    folder: Path  # texts, arrays by name and results, shared by all workers
    cache: Path  # folder of cached embeddings
    miner: Miner
    instruction: str | None  # of the queries; None for the model's own prompt
    options: MiningOptions
    window: int  # candidates per query that the rules see
    shard_texts: int  # passages whose embeddings are in memory together
    search: str  # faiss or torch
    half: bool  # cache embeddings in 16 bits
    tasks: int  # number of tasks that share the work

    # Texts and arrays

    def save(self, name: str, array: NDArray[Any]) -> None:
        """Write an array."""
        save_array(self.folder / f"{name}.npy", array)

    def load(self, name: str) -> NDArray[Any]:
        """Map an array into memory; up to 64 MiB of it are checked."""
        path = self.folder / f"{name}.npy"
        check_file(path, f"delete {self.folder}, and it is mined again")
        return np.load(path, mmap_mode="r")

    def texts(self, side: str) -> TextStore:
        """Open the distinct queries or passages."""
        return TextStore(self.folder / f"{side}.arrow")

    def lay_out(self, source: Source, rows: SourceRows, translations: Translations) -> None:
        """Write everything that tasks read."""
        for side in SIDES:
            TextStore.write(self.folder / f"{side}.arrow", distinct_texts(source, side, rows.first[side]))
            self.save(f"{side}_ids", rows.ids[side])
        forms = [np.concatenate([form_ids(texts) for texts in self.texts(side).chunks()]) for side in SIDES]
        numbers = np.split(distinct(np.concatenate(forms))[1], [len(forms[0])])
        for side, ids, form in zip(SIDES, forms, numbers, strict=True):
            self.save(f"{side}_group", translations.groups(ids))
            self.save(f"{side}_form", form)
        query, passage = positives(numbers[0], *(rows.numbers[side] for side in SIDES))
        self.save("pair_query", query)
        self.save("pair_passage", passage)
        (self.folder / "ready").touch()

    # Embedding

    def embedding_cache(self, side: str) -> EmbeddingCache:
        """Open the cache of the queries' or passages' embeddings."""
        made_by = {"role": side, **self.miner.made_by()}
        if side == "query":
            made_by["instruction"] = self.instruction
        return EmbeddingCache(self.cache, made_by, self.half)

    def is_embedded(self) -> bool:
        """Return whether the embeddings of all texts are cached."""
        return all((self.embedding_cache(side).locate(self.load(f"{side}_ids")).file >= 0).all() for side in SIDES)

    def embed(self, task: int) -> None:
        """Embed the texts that are not cached in every ``tasks``-th chunk.

        Chunks do not depend on the number of shards, workers or tasks, and neither do the last bits of embeddings.
        """
        counts = Counter(embedded=0, cached=0)
        for side in SIDES:
            ids, cache, store = self.load(f"{side}_ids"), self.embedding_cache(side), self.texts(side)
            numbers = np.flatnonzero(np.arange(len(ids)) // CHUNK_TEXTS % self.tasks == task)
            missing = numbers[cache.locate(ids[numbers]).file < 0]
            counts.update(embedded=len(missing), cached=len(numbers) - len(missing))
            with self._bar(len(missing), f"embed {side}", "text", task) as bar:
                chunks = np.split(missing, np.flatnonzero(np.diff(missing // CHUNK_TEXTS)) + 1)
                for own in chunks if len(missing) else []:
                    texts = store.take(own).tolist()
                    if side == "query":
                        vectors = self.miner.embed_queries(texts, self.instruction)
                    else:
                        vectors = self.miner.embed_passages(texts)
                    cache.add(ids[own], vectors)
                    bar.update(len(own))
        (self.folder / f"embedded-{self.tasks}-{task:05d}.json").write_text(json.dumps(counts))

    # Search

    @property
    def blocks(self) -> int:
        """Number of blocks of queries."""
        return -(-len(self.load("query_ids")) // BLOCK_QUERIES)

    def search_blocks(self, task: int) -> None:
        """Choose the negatives of every ``tasks``-th block of queries."""
        left = [block for block in range(task, self.blocks, self.tasks) if not self._result(block).exists()]
        ids = {side: self.load(f"{side}_ids") for side in SIDES}
        caches = {side: self.embedding_cache(side) for side in SIDES}
        located = {side: caches[side].locate(ids[side]) for side in SIDES if left}

        def vectors(side: str, start: int, count: int) -> NDArray[np.float32]:
            names, file, row = located[side]
            return caches[side].read(Locations(names, file[start : start + count], row[start : start + count]))

        shards = range(0, len(ids["passage"]), self.shard_texts)
        starts = [block * BLOCK_QUERIES for block in left]
        total = sum(min(BLOCK_QUERIES, len(ids["query"]) - start) for start in starts) * len(shards)
        index: ShardIndex | None = None
        with self._bar(total, "search", "query", task) as bar:
            for block, start in zip(left, starts, strict=True):
                search = BlockSearch(self, vectors("query", start, BLOCK_QUERIES), start)
                for first in shards:
                    if index is None or index.first != first:
                        index = None  # Freed before the next one is read: two may not fit.
                        index = ShardIndex(vectors("passage", first, self.shard_texts), first, self.search)
                    search.add(index, bar)
                negatives, counts = search.choose()
                (self.folder / f"refused-{block:05d}.json").write_text(json.dumps(counts))
                save_array(self._result(block), negatives)

    def _result(self, block: int) -> Path:
        return self.folder / f"negatives-{block:05d}.npy"

    def _bar(self, total: int, what: str, unit: str, task: int) -> tqdm:
        return tqdm(total=total, desc=f"{self.name}: {what}", unit=unit, position=task, disable=None if total else True)

    # Results

    def negatives(self) -> NDArray[np.int64]:
        """Return ``(queries, negatives)`` numbers of passages."""
        return np.concatenate([self.load(self._result(block).stem) for block in range(self.blocks)])

    def counts(self) -> dict[str, dict[str, int]]:
        """Return the numbers of texts embedded and cached, and of candidates that each rule refused."""
        return {
            "texts": self._sum(f"embedded-{self.tasks}-*.json", ("embedded", "cached")),
            "refused": self._sum("refused-*.json", RULES),
        }

    def _sum(self, pattern: str, keys: Sequence[str]) -> dict[str, int]:
        total = Counter(dict.fromkeys(keys, 0))
        for path in self.folder.glob(pattern):
            total.update(json.loads(path.read_text()))
        return dict(total)


class BlockSearch:
    """Candidates of a block of queries, collected shard by shard.

    Args:
        tasks: The source.
        vectors: ``(n, dimensions)`` of the queries, of unit length.
        start: Number of the first query; the others follow.
    """

    def __init__(self, tasks: MiningTasks, vectors: NDArray[np.float32], start: int) -> None:
        self._tasks, self._vectors = tasks, vectors
        self._numbers = slice(start, start + len(vectors))
        self._nearest: list[Nearest] = []
        # Pairs are sorted by query.
        pair_query = tasks.load("pair_query")
        pairs = slice(*np.searchsorted(pair_query, [start, start + len(vectors)]).tolist())
        self._owner = pair_query[pairs] - start
        self._positive = np.array(tasks.load("pair_passage")[pairs])
        self._positive_score = np.zeros(len(self._positive), dtype=np.float32)

    def add(self, index: ShardIndex, bar: tqdm) -> None:
        """Search one shard."""
        window = self._tasks.window
        found = index.search(self._vectors, window, bar.update)
        self._nearest = [merge([*self._nearest, found], window)]
        stop = index.first + len(index.vectors)
        here = np.flatnonzero((self._positive >= index.first) & (self._positive < stop))
        for start in range(0, len(here), _PAIRS):
            own = here[start : start + _PAIRS]
            passages = index.vectors[self._positive[own] - index.first]
            self._positive_score[own] = pair_scores(self._vectors[self._owner[own]], passages[:, None])[:, 0]

    def choose(self) -> tuple[NDArray[np.int64], dict[str, int]]:
        """Apply :func:`choose_negatives` when all shards have been searched."""
        load = self._tasks.load
        relations = Relations(
            form=load("query_form")[self._numbers],
            group=load("query_group")[self._numbers],
            positive_query=self._owner,
            positive=self._positive,
            positive_score=self._positive_score,
            passage_group=load("passage_group"),
            passage_form=load("passage_form"),
        )
        return choose_negatives(self._nearest[0], relations, self._tasks.options)
