"""Pairs evaluated in training: scores are those of the saved model, logged and shown; training is undisturbed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sklearn.metrics import ndcg_score

from tests.training.evaluation.watched_recipe import history, sample, write_watched
from training.evaluation.pairs import Pairs, encode_pairs, evaluate_pairs, nearest, passage_ranks
from training.evaluation.records import load_evaluation
from training.run_stage import main

DIMS = [32, 16, 8]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny stage ran to its end, evaluated at every checkpoint."""
    folder = tmp_path_factory.mktemp("watched")
    assert main([str(write_watched(folder, report_to="tensorboard"))]) == 0
    return folder


def _accuracy(model: SentenceTransformer, pairs: Pairs) -> dict[str, float]:
    return evaluate_pairs(encode_pairs(model, pairs), np.zeros(len(pairs.queries), bool), DIMS)["accuracy"]


def test_scores_are_those_of_the_saved_model(watched: Path) -> None:
    pairs, found = sample(watched), history(watched / "run")
    assert list(found) == [2, 4, 6, 8, 10]
    for step, metrics in found.items():
        model = SentenceTransformer(str(watched / f"run/checkpoint-{step}"))
        accuracy = _accuracy(model, pairs)
        names = {32: "", 16: "_dim16", 8: "_dim8"}
        for dim, suffix in names.items():
            assert round(metrics[f"eval_pairs_accuracy{suffix}"], 4) == accuracy[str(dim)]
        cosines = model.encode_query(pairs.queries) @ model.encode_document(pairs.candidates).T
        relevant = np.array([np.isin(np.arange(len(pairs.candidates)), own) for own in pairs.relevant])
        assert metrics["eval_pairs_ndcg_at_10"] == pytest.approx(ndcg_score(relevant, cosines, k=10), abs=1e-4)
    accuracies = [metrics["eval_pairs_accuracy"] for metrics in found.values()]
    assert len(set(accuracies)) > 1 and 0 < max(accuracies)


def test_scores_are_in_tensorboard(watched: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = {path.parent for path in (watched / "run").rglob("events.out.tfevents.*")}
    events = loading.EventAccumulator(str(folder)).Reload()
    for name in ("accuracy", "accuracy_dim16", "ndcg_at_10"):
        shown = {event.step: event.value for event in events.Scalars(f"eval/pairs_{name}")}
        logged = {step: metrics[f"eval_pairs_{name}"] for step, metrics in history(watched / "run").items()}
        assert shown == pytest.approx(logged)


def test_training_is_the_same_without(watched: Path, tmp_path: Path, check_same_weights) -> None:
    assert main([str(write_watched(tmp_path, evaluation_sample=None))]) == 0
    assert not any(history(tmp_path / "run").values())
    check_same_weights(watched / "run", tmp_path / "run")
    for step in (2, 10):
        states = [folder / f"run/checkpoint-{step}" for folder in (watched, tmp_path)]
        drawn = [torch.load(state / "rng_state.pth", weights_only=False)["cpu"] for state in states]
        assert torch.equal(*drawn)
        tokenizers = [(state / "tokenizer.json").read_bytes() for state in states]
        assert tokenizers[0] == tokenizers[1]
        assert load_file(states[0] / "model.safetensors").keys() == load_file(states[1] / "model.safetensors").keys()


def test_scores_of_a_training_in_bf16_are_near_those_of_the_saved_model(tmp_path: Path) -> None:
    assert main([str(write_watched(tmp_path, bf16=True))]) == 0
    for step, metrics in history(tmp_path / "run").items():
        model = SentenceTransformer(str(tmp_path / f"run/checkpoint-{step}"))
        accuracy = _accuracy(model, sample(tmp_path))
        # Two of thirty pairs.
        assert metrics["eval_pairs_accuracy"] == pytest.approx(accuracy["32"], abs=0.07)


def test_texts_are_cut_where_the_saved_model_cuts_them(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 12}
    keys = {"model_config": shape, "max_length": 12, "max_steps": 2}
    assert main([str(write_watched(tmp_path, **keys))]) == 0
    model = SentenceTransformer(str(tmp_path / "run/checkpoint-2"))
    assert model.max_seq_length == 12
    texts = [model.prompts["query"] + query for query in sample(tmp_path).queries]
    assert min(len(ids) for ids in model.tokenizer(texts)["input_ids"]) > 12
    accuracy = _accuracy(model, sample(tmp_path))
    assert round(history(tmp_path / "run")[2]["eval_pairs_accuracy"], 4) == accuracy["32"]


def test_ranks_are_what_numpy_says_and_the_first_of_equals_is_first() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(50, 16, generator=generator), torch.randn(20, 16, generator=generator)
    candidates[7] = candidates[3]
    labels = np.arange(50) % 20
    for dim in (16, 4):
        near = torch.nn.functional.normalize(candidates[:, :dim], dim=-1)
        order = np.argsort(-(queries[:, :dim] @ near.T).numpy(), axis=1, kind="stable")
        ranks = passage_ranks(queries, candidates, labels, dim, rows_per_block=7)
        assert (ranks == np.argmax(order == labels[:, None], axis=1) + 1).all()
        assert ((ranks == 1) == (nearest(queries, candidates, dim) == labels)).all()


def test_pairs_of_two_columns_are_evaluated_in_training_and_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pairs = tmp_path / "data/found.jsonl"
    recipe = write_watched(tmp_path, evaluation_pairs=str(pairs), max_steps=2)
    columns = pq.read_table(tmp_path / "data/found.parquet").to_pydict()
    lines = [{"query": "the same", "passage": passage} for passage in columns["passage"]]
    pairs.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main([str(recipe)]) == 0
    # All passages are those of the one query, and most candidates are passages.
    metrics, result = history(tmp_path / "run")[2], json.loads((tmp_path / "run/evaluation.json").read_text())
    assert metrics["eval_pairs_accuracy"] in (0, 1) and result["accuracy"]["32"] in (0, 1)
    assert (result["pairs"], result["languages"], result["scripts"]) == (1, {}, {})
    shown = capsys.readouterr().out
    assert "Finding the passages of 1 queries" in shown and "Use the model:" in shown
    (score,) = load_evaluation(tmp_path / "run/report").select(dimension=32, precision="int8")
    assert (score.subset, score.languages, score.examples) == ("default", (), 1)
