"""Exact search of the nearest texts: the same numbers from FAISS and torch, from one shard and from many.

Matrix products differ in their last bits with the library and the shapes. They only propose here: the scores of what
they propose, and of everything that might belong there by a rounding error, are computed anew, each in the same way.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from training.common.errors import UserError

SEARCHES = ("auto", "faiss", "torch")
# More candidates than asked for, so that rounding seldom leaves it open which they are.
_SPARE = 32
# Error of an fp32 product of unit vectors, by the root of their dimensions: some times what is ever seen.
_ROUNDING = 4 * 2.0**-24
# Numbers in memory at once beside the shard itself: a quarter of a gigabyte in fp32.
_NUMBERS = 1 << 26


class Nearest(NamedTuple):
    """The nearest texts of each query, the nearest first, equally near ones by rank.

    Attributes:
        scores: ``(queries, k)`` fp32 inner products.
        texts: ``(queries, k)`` numbers of the texts.
    """

    scores: NDArray[np.float32]
    texts: NDArray[np.int64]


def choose_search(search: str) -> str:
    """What ``auto`` means here: torch where there is a CUDA device, else FAISS where it is installed, else torch.

    Raises:
        UserError: If there is no such search or FAISS is not installed.
    """
    if search not in SEARCHES:
        raise UserError(f"unknown search {search!r}; use one of {', '.join(SEARCHES)}")
    installed = importlib.util.find_spec("faiss") is not None
    if search == "faiss" and not installed:
        raise UserError("search 'faiss' needs FAISS; pip install 'f2llm[mine]', or use 'auto'")
    if search == "auto":
        return "faiss" if installed and not torch.cuda.is_available() else "torch"
    return search


def pair_scores(queries: NDArray[np.float32], texts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products that depend on the two vectors alone, not on what is computed beside them.

    Args:
        queries: ``(n, dimensions)``.
        texts: ``(n, k, dimensions)``.

    Returns:
        ``(n, k)``, summed in fp64.
    """
    return np.einsum("nd,nkd->nk", queries.astype(np.float64), texts.astype(np.float64)).astype(np.float32)


def merge(one: Nearest, other: Nearest, ranks: NDArray[np.int64], k: int) -> Nearest:
    """The ``k`` nearest of two results; ``ranks[text]`` decides between equal scores."""
    scores = np.concatenate([one.scores, other.scores], axis=1)
    texts = np.concatenate([one.texts, other.texts], axis=1)
    order = np.lexsort((ranks[texts], -scores))[:, :k]
    return Nearest(np.take_along_axis(scores, order, axis=1), np.take_along_axis(texts, order, axis=1))


class ShardIndex:
    """The embeddings of some texts, held in memory.

    Args:
        vectors: ``(n, dimensions)`` of unit length.
        first: Number of the first text; the others follow.
        ranks: Ranks of all texts, by number.
        search: ``faiss`` or ``torch``.
    """

    def __init__(self, vectors: NDArray[np.float32], first: int, ranks: NDArray[np.int64], search: str) -> None:
        self.vectors, self.first, self._ranks = vectors, first, ranks
        self._rounding = _ROUNDING * vectors.shape[1] ** 0.5
        self._faiss = self._torch = None
        if search == "faiss":
            import faiss

            self._faiss = faiss.IndexFlatIP(vectors.shape[1])
            self._faiss.add(vectors)
        else:
            self._torch = torch.from_numpy(vectors).to("cuda" if torch.cuda.is_available() else "cpu")

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: NDArray[np.float32], k: int) -> Nearest:
        """The ``k`` nearest texts of each query, or all if there are fewer."""
        k = min(k, len(self))
        # A block of queries against the shard, and against what the products propose, must both fit.
        step = max(1, _NUMBERS // max(len(self), 2 * (k + _SPARE) * self.vectors.shape[1]))
        parts = [self._search(queries[start : start + step], k) for start in range(0, len(queries), step)]
        return Nearest(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def _search(self, queries: NDArray[np.float32], k: int) -> Nearest:
        proposed, texts = self._propose(queries, min(k + _SPARE, len(self)))
        nearest = self._rescored(queries, texts, k)
        if texts.shape[1] < len(self):
            # Texts that were not proposed score no more than the last that was, give or take the rounding.
            unsure = nearest.scores[:, -1] <= proposed[:, -1] + self._rounding
            for row in np.flatnonzero(unsure).tolist():
                self._search_thoroughly(queries[row : row + 1], k, nearest, row)
        return nearest

    def _propose(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._faiss is not None:
            return self._faiss.search(np.ascontiguousarray(queries), k)
        scores, texts = torch.topk(torch.from_numpy(queries).to(self._torch.device) @ self._torch.T, k, dim=1)
        return scores.cpu().numpy(), texts.cpu().numpy()

    def _rescored(self, queries: NDArray[np.float32], texts: NDArray[np.int64], k: int) -> Nearest:
        none = np.zeros((len(queries), 0))
        every = Nearest(pair_scores(queries, self.vectors[texts]), texts + self.first)
        return merge(every, Nearest(none.astype(np.float32), none.astype(np.int64)), self._ranks, k)

    def _search_thoroughly(self, query: NDArray[np.float32], k: int, nearest: Nearest, row: int) -> None:
        """Corrects one row, in which many texts are about as near as the last one."""
        near = np.flatnonzero(self.vectors @ query[0] >= nearest.scores[row, -1] - 2 * self._rounding)
        best = Nearest(nearest.scores[row : row + 1, :0], nearest.texts[row : row + 1, :0])
        step = max(1, _NUMBERS // (2 * self.vectors.shape[1]))
        for start in range(0, len(near), step):
            part = self._rescored(query, near[None, start : start + step], k)
            best = merge(best, part, self._ranks, k)
        nearest.scores[row], nearest.texts[row] = best.scores[0], best.texts[0]
