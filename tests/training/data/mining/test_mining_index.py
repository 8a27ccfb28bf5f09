"""Search gives the exact nearest, to the bit, whatever searches and in however many shards."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.mining.index import Nearest, ShardIndex, choose_search, merge, pair_scores

K = 20


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def vectors(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Queries and texts: spread out, or so near each other that rounding and ties decide."""
    random = np.random.default_rng(0)
    queries, texts = unit(random.standard_normal((50, 16))), unit(random.standard_normal((900, 16)))
    if kind == "ties":
        texts = texts[random.integers(0, 9, 900)]
    if kind == "near":
        texts = unit(texts[:1] + 1e-6 * random.standard_normal(texts.shape))
    return queries, texts


def expected(queries: np.ndarray, texts: np.ndarray, ranks: np.ndarray) -> Nearest:
    scores = pair_scores(queries, np.broadcast_to(texts, (len(queries), *texts.shape)))
    order = np.stack([np.lexsort((ranks, -row))[:K] for row in scores])
    return Nearest(np.take_along_axis(scores, order, axis=1), order)


@pytest.mark.parametrize("kind", ["spread", "ties", "near"])
@pytest.mark.parametrize("search", ["faiss", "torch"])
@pytest.mark.parametrize("shard", [900, 300, 7])
def test_exact(kind: str, search: str, shard: int) -> None:
    if search == "faiss":
        pytest.importorskip("faiss")
    queries, texts = vectors(kind)
    ranks = np.random.default_rng(1).permutation(len(texts))
    nearest = Nearest(np.zeros((50, 0), np.float32), np.zeros((50, 0), np.int64))
    for first in reversed(range(0, len(texts), shard)):
        index = ShardIndex(texts[first : first + shard], first, ranks, search)
        nearest = merge(nearest, index.search(queries, K), ranks, K)
    for found, true in zip(nearest, expected(queries, texts, ranks), strict=True):
        np.testing.assert_array_equal(found, true)


def test_torch_without_faiss(monkeypatch: pytest.MonkeyPatch, refuses) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_search("auto") == "torch"
    with refuses("f2llm[mine]"):
        choose_search("faiss")
    with refuses("unknown search 'annoy'", "faiss"):
        choose_search("annoy")
