"""Any passage of a query is right: sampled in training with the scores of the saved model, and reported after it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sklearn.metrics import ndcg_score

from tests.training.distributed_recipe import save_model, write_distributed_recipe
from tests.training.evaluation.watched_recipe import WATCHED, history, pairs_keys, sample, write_pairs, write_watched
from tests.training.processes import ROOT, accelerate, run_bounded, torchrun
from tests.training.recipes import NO_NEW_MODEL
from training.evaluation.pairs import (
    EncodedPairs,
    Pairs,
    encode_pairs,
    evaluate_pairs,
    load_pairs,
    nearest,
    ranking_scores,
    read_texts,
    sample_pairs,
)
from training.evaluation.records import PRECISIONS, load_evaluation
from training.evaluation.report import table
from training.run_stage import main

COLUMNS = {"query": ["NA", "00001", 'a, "b"\nc'], "passage": ["null", "0.50", "大熊猫"]}


def _write(path, columns):
    frame = pd.DataFrame(columns)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False, encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.csv", "pairs.jsonl", "pairs"])
def test_texts_are_read_as_they_are_and_faults_are_named(tmp_path, name, refuses):
    with refuses(f"{name}: no such file"):
        read_texts(tmp_path / name, ["query"])
    path = _write(tmp_path / name, COLUMNS)
    assert read_texts(path, ["query"], ["passage", "lang"]) == COLUMNS
    assert read_texts(path, ["passage"]) == {"passage": COLUMNS["passage"]}
    with refuses(f"{name}: column 'lang' is missing; it has query"):
        read_texts(path, ["query", "lang"])
    with refuses(f"{name}: row 1, column 'query' is not text"):
        read_texts(_write(path, {"query": ["a", " "], "passage": ["b", "c"]}), ["query"])


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.parquet", b"no parquet", "not a readable parquet file"),
        ("a.csv", b"query,passage\n", "the file has no rows"),
        ("a.csv", b"query,passage\na,b\nc\n", "not a readable csv file"),
        ("a.csv", b"query,passage\na,\xff\n", "not a readable csv file"),
        ("a.csv", b"query,passage,query\na,b,c\n", "column 'query' is there twice"),
        ("a.jsonl", b"", "the file has no rows"),
        ("a.jsonl", b'{"query": "a", "passage": "b"}\n{"query": 42, "passage": "b"}\n', "column query"),
        ("a.jsonl", b'{"query": "a", "passage": "b"}\n{"query": "c"}\n', "row 1, column 'passage' is not text"),
        ("a.jsonl", b'["a", "b"]\n', "column 'query' is missing"),
        ("a.jsonl", b'{"query": "\xff"}\n', "not a readable jsonl file"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path, refuses, name, content, part):
    (tmp_path / name).write_bytes(content)
    with refuses(tmp_path / name, part):
        read_texts(tmp_path / name, ["query", "passage"])


# "dollar" has two passages, one of them in two spellings; the same text in another language has a third.
ROWS = {
    "query": ["dollar", "dollar", "dollar", "euro"],
    "passage": ["US dollar", "Canadian dollar", "dollar sign", "Euro"],
    "lang": ["de", "de", "fr", "de"],
    "script": ["Latn"] * 4,
}
CANDIDATES = ["Euro", "US Dollar", "us dollar.", "Canadian dollar", "dollar sign", "yen", "US dollar"]


def _files(folder, **changes):
    rows = {name: values for name, values in {**ROWS, **changes}.items() if values}
    pairs = _write(folder / "pairs.parquet", rows)
    return pairs, _write(folder / "candidates.parquet", {"passage": CANDIDATES})


def test_any_passage_of_a_query_is_a_hit(tmp_path):
    pairs = load_pairs(*_files(tmp_path))
    assert (pairs.queries, pairs.languages) == (["dollar", "dollar", "euro"], ["de", "fr", "de"])
    assert pairs.relevant == [(1, 2, 3, 4, 6), (1, 2, 3, 4, 6), (0,)]
    candidates = torch.eye(len(CANDIDATES))
    for position, text in enumerate(CANDIDATES):
        queries = candidates[[position, position, 0]]
        result = evaluate_pairs(EncodedPairs(pairs, queries, candidates, 1.0), np.zeros(3, bool), [7])
        expected = 1.0 if text not in ("Euro", "yen") else 1 / 3
        assert result["accuracy"]["7"] == pytest.approx(expected, abs=1e-4) and result["pairs"] == 3
        assert ranking_scores(queries, candidates, pairs, 7)[0] == pytest.approx(expected)


def test_a_missing_script_is_the_usual_one_and_a_passage_that_is_not_a_candidate_is_refused(tmp_path, refuses):
    files = _files(tmp_path, lang=["de", "ru", "und", "Klingon!"], script=None)
    assert load_pairs(*files).scripts == ["Latn", "Cyrl", "Zyyy", "Zyyy"]
    files = _files(tmp_path, passage=["US dollar", "Canadian dollar", "franc", "Euro"])
    with refuses("pairs.parquet: row 2, column 'passage' is not among the candidates", "candidates.parquet"):
        load_pairs(*files)


def test_ndcg_of_several_passages_is_that_of_scikit_learn(monkeypatch):
    monkeypatch.setattr("training.evaluation.pairs._BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(40, 16, generator=generator), torch.randn(30, 16, generator=generator)
    drawn = np.random.default_rng(0)
    relevant = [tuple(sorted(drawn.choice(30, drawn.integers(1, 14), replace=False).tolist())) for _ in range(40)]
    pairs = Pairs(["q"] * 40, ["c"] * 30, relevant)
    for dim in (16, 4):
        cosines = queries[:, :dim] @ torch.nn.functional.normalize(candidates[:, :dim], dim=-1).T
        gains = np.array([np.isin(np.arange(30), own) for own in relevant])
        accuracy, ndcg = ranking_scores(queries, candidates, pairs, dim)
        assert ndcg == pytest.approx(ndcg_score(gains, cosines, k=10))
        hits = pairs.hits(nearest(queries, candidates, dim))
        assert accuracy == hits.mean() == gains[range(40), cosines.argmax(1)].mean()


SUFFIXES = {32: "", 16: "_dim16", 8: "_dim8"}


@pytest.fixture
def pairs():
    """A hundred pairs of fifty candidates: sixty rows of one language, thirty of another, ten of a third, mixed."""
    languages = [("deu" if row % 10 == 9 else "fra" if row % 10 > 5 else "kor") for row in range(100)]
    queries, candidates = [f"query {row}" for row in range(100)], [f"passage {number}" for number in range(50)]
    # Every fifth query has two passages.
    relevant = [(row * 7 % 50,) if row % 5 else (row % 50, row % 50 + 1) for row in range(100)]
    return Pairs(queries, candidates, relevant, languages, [f"s{row}" for row in range(100)])


def passages(pairs):
    texts = [{pairs.candidates[position] for position in own} for own in pairs.relevant]
    return dict(zip(pairs.queries, texts, strict=True))


@pytest.mark.parametrize(("size", "candidates"), [(10, 50), (10, 20), (10, 3), (100, 1)])
def test_a_sample_keeps_the_shares_of_languages_and_all_passages(pairs, size, candidates):
    found = sample_pairs(pairs, size, candidates)
    assert Counter(found.languages) == {"kor": 6 * size // 10, "fra": 3 * size // 10, "deu": size // 10}
    rows = [int(query.split()[1]) for query in found.queries]
    assert rows == sorted(rows) and [f"s{row}" for row in rows] == found.scripts
    # From all parts of the file.
    assert min(rows) < 20 and max(rows) >= 80
    taken = set.union(*passages(found).values())
    assert len(found.candidates) == max(candidates, len(taken)) and taken <= set(found.candidates)
    positions = [pairs.candidates.index(candidate) for candidate in found.candidates]
    assert positions == sorted(set(positions)) and passages(found).items() <= passages(pairs).items()
    # Without languages, rows are evenly spaced.
    assert sample_pairs(pairs, 1000, 50) == pairs
    found = sample_pairs(replace(pairs, languages=None, scripts=None), 10, 50)
    assert found.queries == [f"query {row}" for row in range(5, 100, 10)]
    assert found.languages is found.scripts is None and passages(found).items() <= passages(pairs).items()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A folder in which the tiny stage ran to its end, evaluated at every checkpoint."""
    folder = tmp_path_factory.mktemp("watched")
    assert main([str(write_watched(folder, report_to="tensorboard"))]) == 0
    return folder


def accuracy(model, pairs):
    return evaluate_pairs(encode_pairs(model, pairs), np.zeros(len(pairs.queries), bool), list(SUFFIXES))["accuracy"]


def test_scores_in_training_are_those_of_the_saved_model(watched):
    pairs, found = sample(watched), history(watched / "run")
    assert list(found) == [2, 4, 6, 8, 10]
    relevant = np.array([np.isin(np.arange(len(pairs.candidates)), own) for own in pairs.relevant])
    for step, metrics in found.items():
        model = SentenceTransformer(str(watched / f"run/checkpoint-{step}"))
        expected = accuracy(model, pairs)
        for dim, suffix in SUFFIXES.items():
            assert round(metrics[f"eval_pairs_accuracy{suffix}"], 4) == expected[str(dim)]
        cosines = model.encode_query(pairs.queries) @ model.encode_document(pairs.candidates).T
        assert metrics["eval_pairs_ndcg_at_10"] == pytest.approx(ndcg_score(relevant, cosines, k=10), abs=1e-4)
    accuracies = [metrics["eval_pairs_accuracy"] for metrics in found.values()]
    assert len(set(accuracies)) > 1 and 0 < max(accuracies)


def test_training_is_the_same_without(watched, tmp_path, check_same_weights):
    assert main([str(write_watched(tmp_path, evaluation_sample=None))]) == 0
    assert not any(history(tmp_path / "run").values())
    check_same_weights(watched / "run", tmp_path / "run")
    for step in (2, 10):
        states = [folder / f"run/checkpoint-{step}" for folder in (watched, tmp_path)]
        assert torch.equal(*(torch.load(state / "rng_state.pth", weights_only=False)["cpu"] for state in states))
        assert len({(state / "tokenizer.json").read_bytes() for state in states}) == 1
        assert len({frozenset(load_file(state / "model.safetensors")) for state in states}) == 1


# The model is narrow and reads short texts, or trains in bf16: there, two of thirty pairs may differ.
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 12}
SHORT = {"model_config": SHAPE, "max_length": 12, "max_steps": 2}


@pytest.mark.parametrize(("keys", "tolerance"), [(SHORT, 5e-5), ({"bf16": True}, 0.07)], ids=["short", "bf16"])
def test_texts_are_truncated_and_rounded_as_in_the_saved_model(tmp_path, keys, tolerance):
    assert main([str(write_watched(tmp_path, **keys))]) == 0
    for step, metrics in history(tmp_path / "run").items():
        model = SentenceTransformer(str(tmp_path / f"run/checkpoint-{step}"))
        if keys is SHORT:
            texts = [model.prompts["query"] + query for query in sample(tmp_path).queries]
            assert min(len(ids) for ids in model.tokenizer(texts)["input_ids"]) > 12 == model.max_seq_length
        expected = accuracy(model, sample(tmp_path))["32"]
        assert metrics["eval_pairs_accuracy"] == pytest.approx(expected, abs=tolerance)


def test_pairs_of_two_columns_are_evaluated_in_training_and_after_it(tmp_path, capsys):
    path = tmp_path / "data/found.jsonl"
    recipe = write_watched(tmp_path, evaluation_pairs=str(path), max_steps=2)
    columns = pq.read_table(tmp_path / "data/found.parquet").to_pydict()
    lines = [{"query": "the same", "passage": passage} for passage in columns["passage"]]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main([str(recipe)]) == 0
    # All passages are those of the one query, and most candidates are passages.
    metrics, result = history(tmp_path / "run")[2], json.loads((tmp_path / "run/evaluation.json").read_text())
    assert metrics["eval_pairs_accuracy"] in (0, 1) and result["accuracy"]["32"] in (0, 1)
    assert (result["pairs"], result["languages"], result["scripts"]) == (1, {}, {}) and "script" not in table(result)
    shown = capsys.readouterr().out
    assert "Finding the passages of 1 queries" in shown and "Use the model:" in shown
    (score,) = load_evaluation(tmp_path / "run/report").select(dimension=32, precision="int8")
    assert (score.subset, score.languages, score.examples) == ("default", (), 1)


def test_exits_are_scored_beside_the_whole_model(tmp_path, capsys):
    assert main([str(write_watched(tmp_path, max_steps=2, exit_layers="auto", evaluation_sample=None))]) == 0
    result, folder = json.loads((tmp_path / "run/evaluation.json").read_text()), tmp_path / "run/model"
    shorter = SentenceTransformer(str(folder), config_kwargs={"num_hidden_layers": 1})
    pairs = load_pairs(tmp_path / "data/found.parquet")
    assert result["exits"] == {"1": accuracy(shorter, pairs), "2": result["accuracy"]}
    assert "1 layer  2 layers" in capsys.readouterr().out
    evaluation = load_evaluation(tmp_path / "run/report")
    assert [each.layers for each in evaluation.models] == [1, None, None]
    for record, precision, dim in product(evaluation.models[:2], PRECISIONS, SUFFIXES):
        assert evaluation.select(model=record.label, precision=precision, dimension=dim)


def test_exits_of_an_adapter_are_those_of_its_stage(tmp_path):
    keys = {"max_steps": 1, "evaluation_sample": None}
    assert main([str(write_watched(tmp_path, **keys))]) == 0
    start = {"model": str(tmp_path / "run/model"), **NO_NEW_MODEL, "lora": True, "output_dir": str(tmp_path / "lora")}
    assert main([str(write_watched(tmp_path, **keys, **start, exit_layers="auto"))]) == 0
    assert {*json.loads((tmp_path / "lora/evaluation.json").read_text())["exits"]} == {"1", "2"}


# Until the first evaluation that is not the best. A process that went by its own numbers would stop elsewhere: only
# rank 0 computes scores.
DECIDING = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "pairs_ndcg_at_10",
    "early_stopping_patience": 1,
    "max_steps": 30,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_config, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tiny_config, tiny_tokenizer)
    return folder


def write_deciding(folder, student, **keys):
    recipe = write_distributed_recipe(
        folder, student, ["mixed"], **{**pairs_keys(folder), **WATCHED, **DECIDING, **keys}
    )
    write_pairs(folder)
    return recipe


@pytest.fixture(scope="module")
def single(tmp_path_factory, student):
    folder = tmp_path_factory.mktemp("single")
    assert main([str(write_deciding(folder, student))]) == 0
    return folder / "run/mixed"


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "sharded"])
def test_two_processes_decide_as_one(tmp_path, single, student, sharded):
    if sharded:
        worker = ROOT / "tests/training/distributed_worker.py"
        command = accelerate(tmp_path, 2, worker, "sharded", write_deciding(tmp_path, student, use_cpu=False))
    else:
        command = torchrun(2, ROOT / "training/run_stage.py", write_deciding(tmp_path, student))
    ended = run_bounded(command, seconds=120)
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert sharded or ended.stdout.count("early stopping at step") == 1
    run = tmp_path / "run/mixed"
    wanted, found = history(single), history(run)
    # Stopped early, but not at once.
    assert 2 < len(wanted) < 15 and list(found) == list(wanted)
    for step, metrics in found.items():
        assert len(metrics) == 6 and metrics == pytest.approx(wanted[step], abs=1e-4)
    state = json.loads((run / f"checkpoint-{max(found)}/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(run / f"checkpoint-{max(found) - 2}")
    folders = (Path(state["best_model_checkpoint"]), run / "model", single / "model")
    best, final, expected = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(final[name], weights) for name, weights in best.items())
    assert max((final[name] - weights).abs().max().item() for name, weights in expected.items()) <= 1e-4
