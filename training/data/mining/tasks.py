"""The tasks of mining one source: embed its texts, then search its passages, in units that any worker can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from training.data.manifest import Source
from training.data.mining.corpus import (
    CHUNK_TEXTS,
    SIDES,
    EmbeddingCache,
    Located,
    Numbered,
    TextStore,
    distinct_texts,
    form_ids,
    load_arrays,
    save_arrays,
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


@dataclass(frozen=True)
class MiningTasks:
    """What workers need to mine a source."""

    name: str
    folder: Path  # texts, arrays by name and results, shared by all workers
    cache: Path  # folder of cached embeddings
    miner: Any  # a training.models.encoders.Miner
    instruction: str | None  # of the queries; None for the model's own prompt
    options: MiningOptions
    window: int  # candidates per query that the rules see
    shard_texts: int  # passages whose embeddings are in memory together
    search: str  # faiss or torch
    tasks: int  # number of tasks that share the work

    # Texts and arrays

    @property
    def _arrays(self) -> Path:
        return self.folder / "arrays.npz"

    def texts(self, side: str) -> TextStore:
        """Open the distinct queries or passages."""
        return TextStore(self.folder / f"{side}.arrow")

    def lay_out(self, source: Source, rows: Mapping[str, Numbered], translations: Translations) -> None:
        """Write everything that tasks read, unless it is there."""
        if self._arrays.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for side in SIDES:
            TextStore.write(self.folder / f"{side}.arrow", distinct_texts(source, side, rows[side].first))
        forms = {side: form_ids(self.texts(side)) for side in SIDES}
        form = np.unique(np.concatenate([*forms.values()]), return_inverse=True)[1]
        query_form, passage_form = np.split(form, [len(forms["query"])])
        # The positives of a query are the passages of all rows whose query is a spelling of it, sorted by query.
        query, passage = (rows[side].numbers for side in SIDES)
        passages_of_form = csr_array((np.ones(len(query), dtype=bool), (query_form[query], passage)))
        save_arrays(
            self._arrays,
            query=rows["query"].ids,
            passage=rows["passage"].ids,
            query_form=query_form,
            passage_form=passage_form,
            query_group=translations.groups(forms["query"]),
            passage_group=translations.groups(forms["passage"]),
            pairs=np.stack(passages_of_form[query_form].nonzero()).astype(np.int64),
        )

    # Embedding

    def _cache(self, side: str) -> EmbeddingCache:
        made_by = {"role": side, **self.miner.made_by()}
        if side == "query":
            made_by["instruction"] = self.instruction
        return EmbeddingCache(self.cache, made_by, self.options.half_cache)

    def _located(self, side: str) -> Located:
        return self._cache(side).locate(*load_arrays(self._arrays, side))

    def count_texts(self) -> dict[str, int]:
        """Return how many texts have to be embedded, and of how many the embedding is cached."""
        missing = np.concatenate([self._located(side).file for side in SIDES]) < 0
        return {"embedded": int(missing.sum()), "cached": int((~missing).sum())}

    def embed(self, task: int) -> None:
        """Embed the texts that are not cached in every ``tasks``-th chunk.

        Chunks do not depend on the number of shards, workers or tasks, and neither do the last bits of embeddings.
        """
        for side in SIDES:
            (ids,) = load_arrays(self._arrays, side)
            cache, store = self._cache(side), self.texts(side)
            missing = cache.locate(ids).file < 0
            starts = range(task * CHUNK_TEXTS, len(ids), self.tasks * CHUNK_TEXTS)
            chunks = [start + np.flatnonzero(missing[start : start + CHUNK_TEXTS]) for start in starts]
            with self._bar(sum(map(len, chunks)), f"embed {side}", "text", task) as bar:
                for numbers in filter(len, chunks):
                    texts = store.take(numbers).tolist()
                    if side == "query":
                        vectors = self.miner.embed_queries(texts, self.instruction)
                    else:
                        vectors = self.miner.embed_passages(texts)
                    cache.add(ids[numbers], vectors)
                    bar.update(len(numbers))

    # Search

    @property
    def blocks(self) -> int:
        """Number of blocks of queries."""
        (ids,) = load_arrays(self._arrays, "query")
        return -(-len(ids) // BLOCK_QUERIES)

    def _result(self, block: int) -> Path:
        return self.folder / f"negatives-{block:05d}.npz"

    def search_blocks(self, task: int) -> None:
        """Choose the negatives of every ``tasks``-th block of queries."""
        blocks = range(task, self.blocks, self.tasks)
        left = [block for block in blocks if not self._result(block).exists()]
        queries, passages = (self._located(side) for side in SIDES)
        firsts = range(0, len(passages.file), self.shard_texts)
        index: ShardIndex | None = None

        def shards() -> Iterator[ShardIndex]:
            nonlocal index
            for first in firsts:
                if index is None or index.first != first:
                    index = None
                    index = ShardIndex(passages.read(first, first + self.shard_texts), first, self.search)
                yield index

        starts = [block * BLOCK_QUERIES for block in left]
        counts = [len(queries.file[start : start + BLOCK_QUERIES]) for start in starts]
        with self._bar(sum(counts) * len(firsts), "search", "query", task) as bar:
            for block, start in zip(left, starts, strict=True):
                self._search_block(block, queries.read(start, start + BLOCK_QUERIES), shards(), bar)

    def _search_block(self, block: int, vectors: NDArray[np.float32], shards: Iterator[ShardIndex], bar: tqdm) -> None:
        own = slice(block * BLOCK_QUERIES, block * BLOCK_QUERIES + len(vectors))
        names = ("pairs", "query_form", "query_group", "passage_form", "passage_group")
        (pair_query, pair_passage), form, group, passage_form, passage_group = load_arrays(self._arrays, *names)
        pairs = slice(*np.searchsorted(pair_query, [own.start, own.stop]).tolist())
        owner, positive = pair_query[pairs] - own.start, pair_passage[pairs]
        score = np.zeros(len(positive), dtype=np.float32)
        nearest: list[Nearest] = []
        for shard in shards:
            nearest = [merge([*nearest, shard.search(vectors, self.window, bar.update)], self.window)]
            here = np.flatnonzero((positive >= shard.first) & (positive < shard.first + len(shard.vectors)))
            for some in np.split(here, range(_PAIRS, len(here), _PAIRS)):
                passages = shard.vectors[positive[some] - shard.first]
                score[some] = pair_scores(vectors[owner[some]], passages[:, None])[:, 0]
            # Freed before the next one is read: two may not fit.
            del shard
        relations = Relations(form[own], group[own], owner, positive, score, passage_group, passage_form)
        negatives, refused = choose_negatives(nearest[0], relations, self.options)
        save_arrays(self._result(block), negatives=negatives, refused=np.array([*refused.values()]))

    def _bar(self, total: int, what: str, unit: str, task: int) -> tqdm:
        return tqdm(total=total, desc=f"{self.name}: {what}", unit=unit, position=task, disable=None if total else True)

    def results(self) -> tuple[NDArray[np.int64], dict[str, int]]:
        """Return ``(queries, negatives)`` numbers of passages, and how many candidates each rule refused."""
        found = [load_arrays(self._result(block), "negatives", "refused") for block in range(self.blocks)]
        negatives, refused = zip(*found, strict=True)
        return np.concatenate(negatives), dict(zip(RULES, sum(refused).tolist(), strict=True))
