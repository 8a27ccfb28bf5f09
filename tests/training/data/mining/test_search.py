"""Search gives the exact nearest passages, and each rule refuses what it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.preprocessing import normalize

from training.data.mining.search import (
    RULES,
    MiningOptions,
    Nearest,
    Relations,
    ShardIndex,
    choose_negatives,
    choose_search,
    merge,
    pair_scores,
)

K = 20


@pytest.mark.parametrize("distinct", [900, 60])
@pytest.mark.parametrize("search", ["faiss", "torch"])
@pytest.mark.parametrize("shard", [900, 300, 7])
def test_the_exact_nearest_from_any_number_of_shards(distinct, search, shard):
    if search == "faiss":
        pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    queries, texts = (normalize(random.standard_normal((n, 16))).astype(np.float32) for n in (50, 900))
    # Of 60 vectors among 900, each one is there 15 times: equal scores are in the order of the numbers.
    texts = texts[random.permutation(np.arange(900) % distinct)]
    parts = []
    for first in reversed(range(0, len(texts), shard)):
        index = ShardIndex(texts[first : first + shard], first, search)
        parts = [merge([*parts, index.search(queries, K)], K)]
    scores = pair_scores(queries, np.broadcast_to(texts, (len(queries), *texts.shape)))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    np.testing.assert_array_equal(parts[0].texts, order)
    np.testing.assert_array_equal(parts[0].scores, np.take_along_axis(scores, order, axis=1))


def test_torch_without_faiss(monkeypatch, refuses):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_search("auto") == "torch"
    with refuses("f2llm[mine]"):
        choose_search("faiss")


# Rules: one query, passages 0, 1, … with these scores; passage 1 is the positive.

SCORES = [0.95, 0.9, 0.86, 0.82, 0.79, 0.7, 0.6, 0.5, 0.4]
OPEN = MiningOptions(top=9, skip=0, max_score=1.01, relative=2.0, negatives=9)
GROUPS = [7, 3, -1, 3, 7, 5, -1, 5, 3]


@pytest.mark.parametrize(
    ("known", "negatives", "counts"),
    [
        ({}, [0, 2, 3, 4, 5, 6, 7, 8], {"positive": 1}),
        ({"form": 0}, [2, 3, 4, 5, 6, 7, 8], {"positive": 1, "same_text": 1}),
        # 0 and 4 are spellings of the positive, 2 one of the query.
        ({"forms": [1, 1, 9, 3, 1, 5, 6, 7, 8], "form": 9}, [3, 5, 6, 7, 8], {"positive": 3, "same_text": 1}),
        # Of several spellings, the nearest is kept.
        ({"forms": [0, 1, 2, 0, 2, 5, 6, 2, 8]}, [0, 2, 5, 6, 8], {"positive": 1, "repeated": 3}),
        # As published: lower, not as low.
        ({"max_score": 0.79}, [5, 6, 7, 8], {"positive": 1, "score": 4}),
        # 0.95 * 0.9 = 0.855; of several positives, the lowest counts: 0.95 * 0.6 = 0.57.
        ({"relative": 0.95}, [3, 4, 5, 6, 7, 8], {"positive": 1, "relative": 2}),
        ({"relative": 0.95, "positives": [1, 6]}, [7, 8], {"positive": 2, "relative": 5}),
        # 5 % of 0.4 below -0.4 is -0.42; 0.95 times -0.4 would be above it.
        ({"relative": 0.95, "scores": [0.1, -0.4, -0.41, -0.43]}, [3], {"positive": 1, "relative": 2}),
        # Translations of the positive, then of the query too. Texts outside all groups are not one group.
        ({"groups": GROUPS}, [0, 2, 4, 5, 6, 7], {"positive": 1, "translation": 2}),
        ({"groups": GROUPS, "group": 7}, [2, 5, 6, 7], {"positive": 1, "translation": 4}),
        ({"groups": [-1] * 9, "group": -1}, [0, 2, 3, 4, 5, 6, 7, 8], {"positive": 1}),
        # The nearest are skipped after the rules.
        ({"max_score": 0.8, "relative": 0.95, "skip": 2, "negatives": 2}, [6, 7], {"positive": 1, "score": 3}),
    ],
)
def test_each_rule(known, negatives, counts):
    given = {"scores": SCORES, "positives": [1], "form": -1, "group": -1, "forms": range(9), "groups": [-1] * 9} | known
    options = replace(OPEN, **{key: known[key] for key in known if hasattr(OPEN, key)})
    nearest = Nearest(np.array([given["scores"]], dtype=np.float32), np.arange(len(given["scores"]))[None])
    positives = np.array(given["positives"])
    queries = np.array([given["form"]]), np.array([given["group"]]), np.zeros_like(positives)
    passages = np.array(given["groups"]), np.array(given["forms"])
    relations = Relations(*queries, positives, nearest.scores[0, positives], *passages)
    found, refused = choose_negatives(nearest, relations, options)
    assert list(refused) == list(RULES)
    assert [number for number in found[0].tolist() if number >= 0] == negatives
    assert {rule: count for rule, count in refused.items() if count} == counts


def test_options_out_of_range(refuses):
    values = [("skip", -1), ("negatives", 0), ("top", 28), ("max_score", 80), ("max_score", float("nan"))]
    for key, value in [*values, ("relative", 0)]:
        with refuses(f"{key.replace('_', '-')} must be", f"got {value}"):
            MiningOptions(**{key: value})
