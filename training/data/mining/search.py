"""The search of one block of queries, shard by shard, and the choice of their negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from training.data.mining.index import Nearest, ShardIndex, merge, pair_scores
from training.data.mining.rules import MiningOptions, Relations, choose_negatives

# Queries between two movements of the progress bar.
_STEP = 1024


class BlockSearch:
    """Candidates of some queries so far.

    Args:
        load: Gives the arrays of the source by name.
        vectors: ``(n, dimensions)`` of the queries, of unit length.
        start: Number of the first query; the others follow.
        window: Candidates kept a query.
        options: The thresholds.
    """

    def __init__(
        self,
        load: Callable[[str], NDArray[Any]],
        vectors: NDArray[np.float32],
        start: int,
        window: int,
        options: MiningOptions,
    ) -> None:
        self._load, self._vectors, self._window, self._options = load, vectors, window, options
        self._numbers = slice(start, start + len(vectors))
        self._ranks = load("passage_rank")
        none = np.zeros((len(vectors), 0))
        self._nearest = Nearest(none.astype(np.float32), none.astype(np.int64))
        # Pairs are sorted by query.
        pair_query = load("pair_query")
        pairs = slice(*np.searchsorted(pair_query, [start, start + len(vectors)]).tolist())
        self._owner = pair_query[pairs] - start
        self._positive = np.array(load("pair_passage")[pairs])
        self._positive_score = np.zeros(len(self._positive), dtype=np.float32)

    def add(self, index: ShardIndex, bar: tqdm) -> None:
        """Searches one shard."""
        parts = []
        for start in range(0, len(self._vectors), _STEP):
            queries = self._vectors[start : start + _STEP]
            parts.append(index.search(queries, self._window))
            bar.update(len(queries))
        found = Nearest(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        self._nearest = merge(self._nearest, found, self._ranks, self._window)
        here = np.flatnonzero((self._positive >= index.first) & (self._positive < index.first + len(index)))
        for start in range(0, len(here), _STEP):
            own = here[start : start + _STEP]
            passages = index.vectors[self._positive[own] - index.first]
            self._positive_score[own] = pair_scores(self._vectors[self._owner[own]], passages[:, None])[:, 0]

    def choose(self) -> tuple[NDArray[np.int64], dict[str, int]]:
        """Applies the rules, when all shards have been searched; see :func:`choose_negatives`."""
        relations = Relations(
            form=self._load("query_form")[self._numbers],
            group=self._load("query_group")[self._numbers],
            positive_query=self._owner,
            positive=self._positive,
            positive_score=self._positive_score,
            passage_group=self._load("passage_group"),
            passage_form=self._load("passage_form"),
        )
        return choose_negatives(self._nearest, relations, self._options)
