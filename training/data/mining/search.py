"""The nearest passages of each query, and which of them become its negatives."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from training.common.errors import UserError
from training.data.cldr.draws import repeated
from training.data.manifest import Source
from training.data.mining.corpus import Ids, find, form_ids, read_ids

SEARCHES = ("auto", "faiss", "torch")
# A candidate that several rules refuse counts for the first.
RULES = ("positive", "same_text", "translation", "score", "relative", "repeated")
# The rule after all of these and the skipped candidates, if there is a reranker.
RERANKER = "reranker"
# Candidates proposed in addition to those that are asked for: the scores of all are computed again.
_SPARE = 32
# Numbers in memory at once besides the passages: 256 MiB in fp32.
_NUMBERS = 1 << 26
# Queries between two updates of the progress bar.
_MOST_QUERIES = 1024


class Nearest(NamedTuple):
    """The nearest passages of each query, nearest first; equal scores are in the order of the numbers."""

    scores: NDArray[np.float32]  # (queries, k) inner products
    texts: NDArray[np.int64]  # (queries, k) numbers of passages


def choose_search(search: str) -> str:
    """Resolve ``auto``: torch with a CUDA device or without FAISS, else FAISS."""
    installed = importlib.util.find_spec("faiss") is not None
    if search == "faiss" and not installed:
        raise UserError("search 'faiss' needs FAISS; pip install 'f2llm[mine]', or use 'auto'")
    if search == "auto":
        return "faiss" if installed and not torch.cuda.is_available() else "torch"
    return search


def pair_scores(queries: NDArray[np.float32], passages: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``(n, k)`` inner products of ``(n, dimensions)`` queries with ``(n, k, dimensions)`` passages."""
    # Summed in fp64, they are the same in every batch, shard and library, unlike a matrix product.
    return np.einsum("nd,nkd->nk", queries.astype(np.float64), passages.astype(np.float64)).astype(np.float32)


def merge(parts: Sequence[Nearest], k: int) -> Nearest:
    """Return the ``k`` nearest of several results of the same queries."""
    scores, texts = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    order = np.lexsort((texts, -scores))[:, :k]
    return Nearest(np.take_along_axis(scores, order, axis=1), np.take_along_axis(texts, order, axis=1))


class ShardIndex:
    """Exact search among ``(n, dimensions)`` vectors of unit length, of the passages from number ``first`` on."""

    def __init__(self, vectors: NDArray[np.float32], first: int, search: str) -> None:
        self.vectors, self.first = vectors, first
        if search == "faiss":
            # Optional package.
            import faiss

            index = faiss.IndexFlatIP(vectors.shape[1])
            index.add(vectors)
            self._propose = lambda queries, k: index.search(np.ascontiguousarray(queries), k)[1]
        else:
            passages = torch.from_numpy(vectors).to("cuda" if torch.cuda.is_available() else "cpu")
            scores = lambda queries: torch.from_numpy(queries).to(passages.device) @ passages.T  # noqa: E731
            self._propose = lambda queries, k: torch.topk(scores(queries), k, dim=1)[1].cpu().numpy()

    def search(self, queries: NDArray[np.float32], k: int, progress: Callable[[int], Any] = int) -> Nearest:
        """Return the ``k`` nearest passages of each query, or all; ``progress`` is called with numbers of queries."""
        count = min(k + _SPARE, len(self.vectors))
        # Scores of all passages, or vectors of all candidates, of as many queries as fit.
        step = _NUMBERS // max(len(self.vectors), 2 * count * self.vectors.shape[1])
        step = min(max(step, 1), _MOST_QUERIES)
        parts = []
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            texts = self._propose(block, count)
            parts.append(merge([Nearest(pair_scores(block, self.vectors[texts]), texts + self.first)], k))
            progress(len(block))
        return Nearest(*map(np.concatenate, zip(*parts, strict=True)))


def bitext_sources(sources: Sequence[Source]) -> list[Source]:
    """Return the sources whose pairs are taken for translations; symmetric clustering would make one of a class."""
    return [source for source in sources if source.symmetric and source.task_type == "retrieval"]


class Translations:
    """Groups of texts that bitext sources pair, directly or by a chain of pairs, in any spelling."""

    def __init__(self, sources: Sequence[Source]) -> None:
        ids = read_ids([file for source in sources for file in source.files], form_ids)
        self._ids, ends = np.unique(np.concatenate([ids.query, ids.passage]), return_inverse=True)
        pairs = (np.ones(len(ends) // 2, dtype=bool), tuple(ends.reshape(2, -1)))
        graph = coo_array(pairs, shape=(len(self._ids),) * 2)
        groups = connected_components(graph, directed=False)[1] if sources else []
        # The last entry is for texts in no group.
        self._groups = np.append(groups, -1).astype(np.int64)

    def groups(self, ids: Ids) -> NDArray[np.int64]:
        """Return ``(n,)`` group numbers of the ids of forms, -1 for those in no group."""
        return self._groups[find(ids, self._ids)]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MiningOptions:
    """What becomes a negative, by default as published; the options of the command."""

    top: int = _option(100, "nearest candidates per query")
    skip: int = _option(5, "nearest candidates skipped, of those that no rule refuses")
    max_score: float = _option(0.8, "negatives score less")
    relative: float = _option(0.95, "negatives score less than this share of the positive's score")
    negatives: int = _option(24, "negatives per row")
    keep_short: bool = _option(False, "keep rows with fewer negatives")
    replace: bool = _option(False, "drop the negatives that rows already have")
    instruction: bool = _option(True, "embed queries with their source's instruction, not the model's own prompt")
    reranker_relative: float = _option(0.95, "the reranker scores negatives below this share of the lowest positive")
    reranker_pool: int = _option(4, "candidates that the reranker may score for each negative that is wanted")
    fit: bool = _option(False, "lower top and negatives for a small corpus; leave out a source without any candidate")

    def __post_init__(self) -> None:
        fits = {
            "top": (self.fit or self.top >= self.skip + self.negatives, "at least skip + negatives"),
            "skip": (self.skip >= 0, "at least 0"),
            "negatives": (self.negatives >= 1, "at least 1"),
            "max_score": (-1 <= self.max_score <= 1.01, "a cosine, -1 to 1, or 1.01 for no limit"),
            "relative": (0 < self.relative <= 2, "above 0 and at most 2"),
            "reranker_relative": (0 < self.reranker_relative <= 2, "above 0 and at most 2"),
            "reranker_pool": (self.reranker_pool >= 1, "at least 1"),
        }
        for name, (fit, expected) in fits.items():
            if not fit:
                raise UserError(f"{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")


class Relations(NamedTuple):
    """What is known about some queries and all passages. Texts of one form are spellings of each other."""

    form: NDArray[np.int64]  # (queries,)
    group: NDArray[np.int64]  # (queries,) groups of translations, -1 for none
    positive_query: NDArray[np.int64]  # (pairs,) positions of queries, ...
    positive: NDArray[np.int64]  # ... numbers of their positives, ...
    positive_score: NDArray[np.float32]  # ... and scores
    passage_group: NDArray[np.int64]  # of all passages, by number
    passage_form: NDArray[np.int64]  # of all passages, by number


def choose_negatives(
    nearest: Nearest, relations: Relations, options: MiningOptions, wanted: int | None = None
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Apply the rules in the order of ``sentence_transformers.util.mine_hard_negatives``, then skip, then take.

    Returns ``(queries, wanted)`` numbers of passages, -1 where there are too few, and how many candidates each of
    ``RULES`` refused; ``wanted`` is ``options.negatives`` if left out.
    """
    refused, counts = np.zeros(nearest.texts.shape, dtype=bool), {}
    for rule, refuses in zip(RULES, _rules(nearest, relations, options), strict=True):
        counts[rule] = int((refuses & ~refused).sum())
        refused |= refuses
    return _take(nearest.texts, ~refused, wanted or options.negatives, options.skip), counts


def rerank(
    candidates: NDArray[np.int64],
    owner: NDArray[np.int64],
    positive: NDArray[np.int64],
    score: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
    options: MiningOptions,
) -> tuple[NDArray[np.int64], int]:
    """Take of each query's candidates, in their order, the first that a reranker does not take for a positive.

    Args:
        candidates: ``(queries, pool)`` numbers of passages, -1 after the last one.
        owner: ``(pairs,)`` positions of queries.
        positive: ``(pairs,)`` numbers of their positives.
        score: Maps ``(n,)`` positions of queries and ``(n,)`` numbers of passages to ``(n,)`` scores.
        options: ``negatives`` are wanted. A candidate must score below the share ``reranker_relative`` of the lowest
            positive: TopK-PercPos of NV-Retriever (https://arxiv.org/abs/2407.15831), with another model's scores.

    Returns:
        ``(queries, options.negatives)`` numbers of passages, -1 where there are too few, and how many were refused.
    """
    limit = _share(_lowest(len(candidates), owner, score(owner, positive)), options.reranker_relative)
    column, good, refused = np.arange(candidates.shape[1]), np.zeros(candidates.shape, dtype=bool), 0
    seen = np.zeros((len(candidates), 1), dtype=np.int64)
    while True:
        # Of each query as many as it still lacks, so that few are scored in vain.
        until = seen + options.negatives - good.sum(axis=1, keepdims=True)
        query, at = np.nonzero((column >= seen) & (column < until) & (candidates >= 0))
        if not len(query):
            return _take(candidates, good, options.negatives), refused
        good[query, at] = score(query, candidates[query, at]) < limit[query]
        refused += int((~good[query, at]).sum())
        seen = until


def _take(texts: NDArray[np.int64], good: NDArray[np.bool_], wanted: int, skip: int = 0) -> NDArray[np.int64]:
    """Return the first ``(rows, wanted)`` good texts of each row after ``skip`` of them, then -1."""
    # The good ones, numbered from 0 along each row.
    position = np.cumsum(good, axis=1) - 1
    row, column = np.nonzero(good & (position >= skip) & (position < skip + wanted))
    taken = np.full((len(texts), wanted), -1, dtype=np.int64)
    taken[row, position[row, column] - skip] = texts[row, column]
    return taken


def _lowest(queries: int, owner: NDArray[np.int64], score: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the lowest score of each query's positives."""
    lowest = np.full(queries, np.inf, dtype=np.float32)
    np.minimum.at(lowest, owner, score)
    return lowest


def _share(score: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    # 0.95 times a negative score would be higher than the score.
    return score - np.abs(score) * np.float32(1 - share)


def _rules(nearest: Nearest, relations: Relations, options: MiningOptions) -> list[NDArray[np.bool_]]:
    """Return which candidates each of ``RULES`` refuses; the lowest score of several positives counts."""
    scores, texts = nearest
    group, form = relations.passage_group[texts], relations.passage_form[texts]
    owner, positives = relations.positive_query, relations.positive
    limit = _share(_lowest(len(scores), owner, relations.positive_score), options.relative)
    translation = (group == relations.group[:, None]) | _listed(group, owner, relations.passage_group[positives])
    return [
        _listed(form, owner, relations.passage_form[positives]),
        form == relations.form[:, None],
        (group >= 0) & translation,
        scores >= np.float32(options.max_score),
        scores >= limit[:, None],
        repeated(form),
    ]


def _listed(values: NDArray[np.int64], row: NDArray[np.int64], value: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which values are in the list of (row, value) pairs of their row."""
    width = max(values.max(initial=0), value.max(initial=0)) + 2
    rows = np.arange(len(values))[:, None]
    return np.isin(rows * width + values + 1, row * width + value + 1)
