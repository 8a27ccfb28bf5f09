"""Scores before and after fine-tuning against plain loops and scikit-learn, their tests, and the answer in words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.metrics import ndcg_score

from training.common.keyed import text_key
from training.evaluation import comparison
from training.evaluation.comparison import (
    ACCURACY,
    NDCG,
    RECALL,
    SPEARMAN,
    HeldOut,
    Part,
    read_held_out,
    score,
    sentence,
    summary,
    table,
)

DIMS = [8, 4]


class Encoder:
    """Gives every text a random vector of its own, whatever its prompt."""

    def __init__(self, seed=0):
        self.seed, self.asked = seed, []

    def _encode(self, texts, **_):
        return torch.stack(
            [
                torch.randn(8, generator=torch.Generator().manual_seed(text_key(f"{self.seed} {text}") % 2**31))
                for text in texts
            ]
        )

    def encode_query(self, texts, **options):
        self.asked.append("query")
        return self._encode(texts, **options)

    def encode_document(self, texts, **options):
        self.asked.append("document")
        return self._encode(texts, **options)


@pytest.fixture
def write(tmp_path):
    def write(name, **columns):
        pd.DataFrame(columns).to_parquet(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def graded_passages(write):
    """Forty queries with one to fifteen passages of different grades among sixty."""
    rows = [(f"q{n}", f"p{(n * 7 + k) % 60}", float(1 + k % 3)) for n in range(40) for k in range(1 + n % 15)]
    queries = write("own.held_out.parquet", **pd.DataFrame(rows, columns=["query", "passage", "score"]))
    return read_held_out("own", queries, write("own.candidates.parquet", passage=[f"p{n}" for n in range(60)]), 2000, 0)


def test_scores_of_graded_passages_are_those_of_plain_loops(graded_passages):
    encoder, held_out = Encoder(), graded_passages
    scores = score(encoder, held_out, DIMS)
    assert encoder.asked == ["query", "document"]
    for dim in DIMS:
        queries, passages = (
            torch.nn.functional.normalize(encoder._encode(texts)[:, :dim], dim=-1).numpy()
            for texts in (held_out.queries, held_out.candidates)
        )
        for row, gains in enumerate(held_out.gains):
            similarities = queries[row] @ passages.T
            truth = np.zeros(60)
            truth[list(gains)] = list(gains.values())
            order = np.argsort(-similarities)
            assert scores[NDCG, dim][row] == pytest.approx(ndcg_score([truth], [similarities], k=10), abs=1e-6)
            assert scores[ACCURACY, dim][row] == (truth[order[0]] > 0)
            assert scores[RECALL, dim][row] == np.count_nonzero(truth[order[:10]]) / min(10, len(gains))


def test_labels_make_all_texts_of_a_class_right(write):
    queries = write("l.held_out.parquet", query=["a", "b"], label=["x", "unknown"])
    held_out = read_held_out("l", queries, write("c.parquet", passage=["p", "q", "r"], label=["x", "y", "x"]), 9, 0)
    assert (held_out.queries, held_out.gains) == (["a"], [{0: 1.0, 2: 1.0}])
    encoder = Encoder()
    score(encoder, held_out, DIMS)
    assert encoder.asked == ["query", "query"]


def test_grades_that_are_no_gains_count_the_same(write):
    queries = write("own.held_out.parquet", query=["a", "a"], passage=["p", "q"], score=[-0.5, 0.3])
    held_out = read_held_out("own", queries, write("c.parquet", passage=["p", "q"]), 9, 0)
    assert held_out.gains == [{0: 1.0, 1: 1.0}]


def test_a_sample_of_queries_keeps_all_candidates(write, tmp_path):
    queries = write("own.held_out.parquet", query=[f"q{n}" for n in range(50)], passage=[f"p{n}" for n in range(50)])
    candidates = write("c.parquet", passage=[f"p{n}" for n in range(50)])
    some, again = (read_held_out("own", queries, candidates, 10, seed=3) for _ in range(2))
    assert (len(some.queries), len(some.candidates)) == (10, 50) and some == again


def test_graded_pairs_are_compared_by_their_correlation(write, tmp_path):
    numbers = np.arange(120)
    pairs = write(
        "g.held_out.parquet",
        query=[f"a{n}" for n in numbers],
        passage=[f"b{n}" for n in numbers],
        score=numbers % 7 / 7,
    )
    held_out = read_held_out("g", pairs, tmp_path / "none.parquet", 2000, 0)
    before = score(Encoder(), held_out, DIMS)
    after = {key: values + 2 * held_out.grades for key, values in before.items()}
    test = Part("your data", [held_out], [before], [after]).test(SPEARMAN, 8)
    expected = [spearmanr(each[SPEARMAN, 8], held_out.grades)[0] for each in (after, before)]
    assert [test.first, test.second] == pytest.approx(expected)
    assert test.difference.low < test.difference.mean == pytest.approx(expected[0] - expected[1])
    assert test.p_value < 0.05 and Part("x", [held_out], [before], [before]).test(SPEARMAN, 8).p_value == 1


def test_the_answer(graded_passages):
    one, other = (score(Encoder(seed), graded_passages, DIMS) for seed in (0, 1))
    better = {key: (values + 1) / 2 for key, values in one.items()}
    parts = [Part(comparison.YOURS, [graded_passages], [one], [better])]
    parts.append(Part(comparison.ELSEWHERE, [graded_passages], [one], [other]))
    result = summary(parts, DIMS)
    full = result["your data"][NDCG]["8"]
    assert full["before"] == pytest.approx(100 * one[NDCG, 8].mean(), abs=0.01)
    assert full["difference"] == pytest.approx(full["after"] - full["before"], abs=0.02)
    assert full["low"] < full["difference"] < full["high"] and full["examples"] == 40
    lines = table(result).splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("before", "after", "diff"))] == [
        "before",
        "after",
        "difference",
    ]
    assert any(line.startswith("4 ") for line in lines)
    words = sentence(result)
    assert words.startswith("better on your data by ") and "; elsewhere " in words and "not significant" in words
    worse = summary([Part(comparison.YOURS, [graded_passages], [better], [one])], DIMS)
    assert sentence(worse).startswith("worse on your data by ")


def test_sets_of_a_part_count_the_same(graded_passages):
    small = HeldOut("small", graded_passages.queries[:2], graded_passages.candidates, graded_passages.gains[:2])
    sets = [graded_passages, small]
    scores = [score(Encoder(), each, DIMS) for each in sets]
    test = Part("your data", sets, scores, scores).test(NDCG, 8)
    assert test.first == pytest.approx(np.mean([each[NDCG, 8].mean() for each in scores]))


def test_all_sets_of_graded_pairs_count(write, tmp_path):
    numbers = np.arange(120)
    columns = {"query": [f"a{n}" for n in numbers], "passage": [f"b{n}" for n in numbers], "score": numbers % 7 / 7}
    sets = [
        read_held_out(name, write(f"{name}.parquet", **columns), tmp_path / "none.parquet", 2000, 0) for name in "gh"
    ]
    before = [score(Encoder(), each, DIMS) for each in sets]
    better = {key: values + 2 * sets[0].grades for key, values in before[0].items()}
    for after in ([better, before[1]], [before[0], better]):
        test = Part("your data", sets, before, after).test(SPEARMAN, 8)
        expected = (
            spearmanr(better[SPEARMAN, 8], sets[0].grades)[0] - spearmanr(before[0][SPEARMAN, 8], sets[0].grades)[0]
        )
        assert test.difference.mean == pytest.approx(expected / 2)
        assert test.difference.low < test.difference.mean < test.difference.high and test.difference.examples == 240


def test_an_interval_beyond_zero_keeps_its_sign():
    full = {"before": 50, "after": 47, "difference": -3.0, "low": -6.4, "high": 0.1, "p": 0.04, "examples": 9}
    assert sentence({"your data": {NDCG: {"8": full}}}) == "worse on your data by 3.0 points (-0.1 to 6.4)"


def test_embeddings_that_are_not_finite_are_no_scores(graded_passages, refuses):
    encoder = Encoder()
    encoder.encode_query = lambda texts, **_: torch.full((len(texts), 8), torch.nan)
    with refuses("own", "not finite", "learning_rate"):
        score(encoder, graded_passages, DIMS)


def test_scores_are_those_of_sentence_transformers():
    encoder, texts = Encoder(), [f"p{n}" for n in range(60)]
    gains = [{(n * 7 + k) % 60: 1.0 for k in range(1 + n % 5)} for n in range(40)]
    held_out = HeldOut("own", [f"q{n}" for n in range(40)], texts, gains)
    relevant = {str(n): {str(position) for position in own} for n, own in enumerate(gains)}
    names = [{str(n): text for n, text in enumerate(each)} for each in (held_out.queries, texts)]
    evaluator = InformationRetrievalEvaluator(*names, relevant, accuracy_at_k=[1], ndcg_at_k=[10])
    queries, passages = (torch.nn.functional.normalize(encoder._encode(each)) for each in (held_out.queries, texts))
    similarities = (queries @ passages.T).tolist()
    found = [[{"corpus_id": str(n), "score": value} for n, value in enumerate(row)] for row in similarities]
    theirs = evaluator.compute_metrics([sorted(row, key=lambda hit: -hit["score"]) for row in found])
    ours = score(encoder, held_out, [8])
    expected = theirs["accuracy@k"][1], theirs["ndcg@k"][10], theirs["recall@k"][10]
    assert [ours[name, 8].mean() for name in (ACCURACY, NDCG, RECALL)] == pytest.approx(expected)


def test_a_query_is_not_found_itself():
    held_out = HeldOut("own", ["a", "b"], ["a", "b", "c"], [{1: 1.0}, {1: 1.0, 2: 1.0}])
    encoder = Encoder()
    ours = torch.nn.functional.normalize(encoder._encode(["a", "b", "c"]))
    assert score(encoder, held_out, [8])[ACCURACY, 8].tolist() == [float(ours[0] @ ours[1] > ours[0] @ ours[2]), 1.0]
