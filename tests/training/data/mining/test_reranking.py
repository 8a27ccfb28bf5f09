"""A reranker refuses candidates as a plain loop over all pairs would, and a killed run does not ask it again."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from sentence_transformers import CrossEncoder

from tests.training.data.mining.mining_helpers import (
    negatives_of,
    random_vectors,
    read_output,
    save_reranker,
    save_vectors,
    write_pairs,
)
from training import mine as command
from training.data.manifest import write_manifest
from training.data.mining import mining
from training.data.mining.mining import mine
from training.data.mining.search import MiningOptions, rerank
from training.models.encoders import find_miner
from training.models.rerankers import Reranker, find_reranker

QUERIES, PASSAGES = [f"q{number}" for number in range(40)], [f"p{number}" for number in range(30)]
PAIRS = [(QUERIES[row * 7 % 40], PASSAGES[row * 11 % 30]) for row in range(60)]
OPTIONS = MiningOptions(top=25, skip=2, max_score=0.9, negatives=4, keep_short=True, reranker_pool=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reranker(tmp_path_factory.mktemp("reranker"), [*QUERIES, *PASSAGES])


@pytest.fixture(scope="module")
def miner(tmp_path_factory):
    return find_miner(str(save_vectors(tmp_path_factory.mktemp("miner"), random_vectors([*QUERIES, *PASSAGES]))))


@pytest.fixture
def run(miner, folder, tmp_path):
    source = write_pairs(tmp_path / "source", PAIRS)

    def run(name, options=OPTIONS, reranker=folder):
        found = reranker and find_reranker(str(reranker))
        report = mine([source], miner, tmp_path / name, options, reranker=found)["sources"]["pairs"]
        return {row["query"]: negatives_of(row) for row in read_output(tmp_path / name)}, report

    return run


@pytest.mark.parametrize("share", [0.95, 1.1])
def test_equals_a_loop_over_all_pairs(run, folder, share):
    options = replace(OPTIONS, reranker_relative=share)
    candidates, _ = run("candidates", replace(OPTIONS, negatives=12), reranker=None)
    model = CrossEncoder(str(folder), device="cpu")
    positives, expected, refused = defaultdict(set), {}, 0
    for query, passage in PAIRS:
        positives[query].add(passage)
    for query, texts in candidates.items():
        limit = share * min(model.predict((query, positive)) for positive in positives[query])
        expected[query] = []
        for text in texts:
            if len(expected[query]) == options.negatives:
                break
            if model.predict((query, text)) < limit:
                expected[query].append(text)
            else:
                refused += 1
    found, report = run("reranked", options)
    assert found == expected and report["refused"]["reranker"] == refused > 40
    assert min(map(len, found.values())) < options.negatives == max(map(len, found.values()))
    assert report["reranker"]["revision"] == find_reranker(str(folder)).revision


def test_a_known_false_negative_is_refused():
    asked = []

    def score(queries, passages):
        asked.extend(zip(queries.tolist(), passages.tolist(), strict=True))
        known = {(0, 9): 0.9, (0, 8): 0.7, (0, 3): 0.8}
        return np.array([known.get(pair, 0.1) for pair in asked[len(asked) - len(queries) :]], dtype=np.float32)

    candidates = np.array([[3, 4, 5, 6], [4, 5, 6, 3], [-1, -1, -1, -1]])
    # The lowest of two positives counts, and a query without candidates costs nothing more.
    owner, positive = np.array([0, 0, 1, 2]), np.array([9, 8, 7, 7])
    options = MiningOptions(top=4, skip=0, negatives=2, reranker_relative=1.0)
    negatives, refused = rerank(candidates, owner, positive, score, replace(options, reranker_relative=1.1))
    assert negatives.tolist() == [[4, 5], [4, 5], [-1, -1]] and refused == 1
    assert asked[4:] == [(0, 3), (0, 4), (1, 4), (1, 5), (0, 5)]
    # A candidate that is as good as the positive is refused.
    assert rerank(candidates, owner, positive, score, options)[0].tolist()[1] == [-1, -1]
    # Shares of negative scores (logits) lie below them.
    logits = lambda queries, passages: np.where(passages < 7, -2.05, -2.0).astype(np.float32)  # noqa: E731
    assert rerank(candidates, owner, positive, logits, replace(options, reranker_relative=0.95))[1] == 8


def test_scores_are_kept_by_block(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "RERANKED_QUERIES", 16)
    expected, whole = run("whole")
    scores, calls = Reranker.scores, []

    def stops(self, queries, passages):
        calls.append(set(queries))
        if calls[-1] & {*QUERIES[20:]} and len(calls) < 99:
            raise KeyboardInterrupt
        return scores(self, queries, passages)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reranker, "scores", stops)
        run("out")
    done = {*np.concatenate([list(each) for each in calls[:-1]])} if len(calls) > 1 else set()
    calls.clear()
    monkeypatch.setattr(Reranker, "scores", lambda self, *pairs: calls.append(set(pairs[0])) or scores(self, *pairs))
    assert run("out") == (expected, {**whole, "texts": {"embedded": 0, "cached": 70}})
    assert not done & set().union(*calls)


def test_the_reranker_and_its_share_make_a_new_result(run, tmp_path):
    _, first = run("out")
    other = save_reranker(tmp_path / "other", [*QUERIES, *PASSAGES], seed=1)
    results = [run("out")[1], run("out", reranker=other)[1], run("out", replace(OPTIONS, reranker_relative=0.3))[1]]
    assert results[0] == first and len({each["fingerprint"] for each in results}) == 3
    assert "reranker" not in run("out", reranker=None)[1]["refused"]


def test_a_model_that_is_no_reranker_is_refused(run, miner, folder, tmp_path, refuses):
    two = save_reranker(tmp_path / "two", QUERIES, num_labels=2)
    with refuses("reranker", two, "2 scores for a pair"):
        run("out", reranker=two)
    headless = tmp_path / "headless"
    model = CrossEncoder(str(folder), device="cpu")
    model.model.bert.save_pretrained(headless)
    model.tokenizer.save_pretrained(headless)
    with refuses("headless", "classifier", "no cross-encoder"):
        run("out", reranker=headless)
    with refuses("no/such", "correct --reranker"):
        find_reranker("no/such")


def test_the_command_takes_a_reranker(miner, folder, tmp_path):
    source = write_pairs(tmp_path / "data", PAIRS)
    write_manifest(tmp_path / "data/manifest.yaml", [{**vars(source), "files": source.files}])
    words = [
        "--manifest",
        str(tmp_path / "data/manifest.yaml"),
        "--model",
        miner.model,
        "--output",
        str(tmp_path / "out"),
    ]
    words += ["--top", "25", "--skip", "2", "--negatives", "4", "--keep-short", "--reranker", str(folder)]
    assert command.main(words) == 0
    report = json.loads((tmp_path / "out/mining.json").read_text())["sources"]["pairs"]
    assert report["refused"]["reranker"] > 0
