"""A stage mines the negatives that its rows lack, once, and trains on them; the run resumes."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from modeling_f2llm import build_sentence_transformer
from tests.training.data.mining.mining_helpers import random_vectors, save_reranker, save_vectors
from tests.training.recipes import _COLOURS, _NAMES, NO_NEW_MODEL, error_of, killed, only_stage, write_single_stage
from training.config.arguments import StageArguments
from training.config.recipe import load_recipe
from training.data.manifest import load_manifest
from training.run_stage import main
from training.stages.mining import mine_negatives


@pytest.fixture
def start(tmp_path, tiny_model, tiny_tokenizer):
    folder = tmp_path / "start"
    build_sentence_transformer(tiny_model, deepcopy(tiny_tokenizer)).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def recipe(tmp_path, start):
    """Writes a recipe whose retrieval source has ``own`` negatives, beside one of clustering."""

    def write(own=0, rows=None, **keys):
        keys = {"model": start, **NO_NEW_MODEL, "mine": True, "max_steps": 2, "save_steps": 1, **keys}
        path = write_single_stage(tmp_path, **{"eval_strategy": "no", "task_types": None, **keys})
        file = tmp_path / "data/retrieval.parquet"
        table = pq.read_table(file).select(["query", "passage", *(f"negative_{k}" for k in range(1, own + 1))])
        pq.write_table(table[:rows], file)
        return path

    return write


def mined(tmp_path):
    return pq.read_table(tmp_path / "run/mined/tiny_retrieval.parquet")


def test_pairs_are_mined_trained_and_resumed(recipe, tmp_path, monkeypatch):
    names, colours = (random_vectors(words, 16, seed) for seed, words in enumerate((_NAMES, _COLOURS)))
    vectors = {**colours, **names, **{f"{name},": vector for name, vector in names.items()}}
    path = recipe(miner=str(save_vectors(tmp_path / "miner", vectors)))
    assert main([str(path), "--dry-run"]) == 0
    first = mined(tmp_path)
    # The 24 that mine.py finds, of which a row may have fewer; all rows stay.
    assert len(first) == 80 and first.column_names[2:] == [f"negative_{k}" for k in range(1, 25)]
    assert all(row["negative_1"] not in (None, row["passage"]) for row in first.to_pylist())
    sources = load_manifest(tmp_path / "run/mined/manifest.yaml")
    given = load_manifest(tmp_path / "data/manifest.yaml")
    assert [each.name for each in sources] == [each.name for each in given]
    same = [each.files[0].samefile(was.files[0]) for each, was in zip(sources, given, strict=True)]
    assert same == [False, True, True]
    # What was mined is found again, by a run that is killed, and by its continuation.
    monkeypatch.setattr("training.data.mining.mining.MiningTasks.run", None)
    killed(path, 1)
    assert main([str(path), "--resume"]) == 0
    assert (tmp_path / "run/model").is_dir() and mined(tmp_path) == first
    assert json.loads((tmp_path / "run/data.json").read_text()).keys() == {each.name for each in given}


def test_only_sources_that_lack_negatives_are_mined(recipe, tmp_path, start):
    manifest = tmp_path / "data/manifest.yaml"

    def mine(own, **keys):
        return mine_negatives(only_stage(load_recipe(recipe(own, **keys))), manifest)

    assert mine(4) == manifest and mine(3) == manifest
    assert mine(0, task_types=["clustering"]) == manifest and mine(0, num_hard_negatives_retrieval=0) == manifest
    assert not (tmp_path / "run").exists()
    assert mine(2) == tmp_path / "run/mined/manifest.yaml"
    own = pq.read_table(tmp_path / "data/retrieval.parquet")
    assert mined(tmp_path).select(own.column_names).to_pylist() == own.to_pylist()
    # One row that lacks one is enough.
    recipe(3)
    file = tmp_path / "data/retrieval.parquet"
    table = pq.read_table(file)
    column = pa.array([*table["negative_3"].to_pylist()[:-1], None])
    pq.write_table(table.set_column(4, "negative_3", column), file)
    arguments = only_stage(load_recipe(tmp_path / "single.yaml"))
    assert mine_negatives(arguments, manifest) != manifest


def test_only_the_process_that_saves_mines(recipe, tmp_path, monkeypatch):
    arguments, manifest = only_stage(load_recipe(recipe())), tmp_path / "data/manifest.yaml"
    monkeypatch.setattr(StageArguments, "should_save", False)
    assert mine_negatives(arguments, manifest) == tmp_path / "run/mined/manifest.yaml"
    assert not (tmp_path / "run").exists()


def test_a_small_corpus_is_left_and_an_earlier_source_forgotten(recipe, tmp_path):
    manifest = tmp_path / "data/manifest.yaml"
    mine_negatives(only_stage(load_recipe(recipe())), manifest)
    content = yaml.safe_load(manifest.read_text())
    content["sources"] = [*content["sources"][1:], {**content["sources"][0], "name": "other"}]
    recipe(rows=5)
    manifest.write_text(yaml.safe_dump(content))
    arguments = only_stage(load_recipe(tmp_path / "single.yaml"))
    sources = load_manifest(mine_negatives(arguments, manifest))
    assert [each.name for each in sources] == ["tiny_clustering", "tiny_classification", "other"]
    assert sources[2].files[0].samefile(tmp_path / "data/retrieval.parquet")


def test_it_is_said_if_no_negative_is_found(recipe, tmp_path, caplog):
    vectors = dict.fromkeys([*_NAMES, *_COLOURS, *(f"{name}," for name in _NAMES)], np.ones(16))
    args = only_stage(load_recipe(recipe(miner=str(save_vectors(tmp_path / "miner", vectors)))))
    mine_negatives(args, tmp_path / "data/manifest.yaml")
    assert "tiny_retrieval: no row has got a negative; refused by rule: positive" in caplog.text


def test_a_reranker_refuses(recipe, tmp_path):
    reranker = save_reranker(tmp_path / "reranker", ["the", "red", "river", "lake"])
    arguments = only_stage(load_recipe(recipe(reranker=str(reranker))))
    mine_negatives(arguments, tmp_path / "data/manifest.yaml")
    report = json.loads((tmp_path / "run/mined/mining.json").read_text())["sources"]["tiny_retrieval"]
    assert "reranker" in report["refused"] and report["reranker"]["model"] == str(reranker)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"mine": None, "miner": "some/model"}, ("key 'miner' has no effect without 'mine: true'",)),
        ({"mine": None, "reranker": "some/model"}, ("key 'reranker' has no effect without 'mine: true'",)),
        ({"miner": "no/where/model"}, ("miner", "no/where/model' is missing")),
        ({"reranker": "no/where/model"}, ("reranker", "no/where/model' is missing")),
        ({"model": None, "model_config": {"hidden_size": 32}, "tokenizer": "train"}, ("key 'mine'", "'miner'")),
    ],
)
def test_keys_that_cannot_hold_are_refused_before_any_work(recipe, tmp_path, capsys, keys, parts):
    error = error_of([recipe(**keys)], capsys)
    assert all(part in error for part in parts)
    assert not (tmp_path / "run").exists()


def test_a_miner_that_is_not_here_yet_is_planned_without(recipe, tmp_path, capsys):
    assert main([str(recipe(miner="Org/model")), "--dry-run"]) == 0
    assert "Org/model, which mines its hard negatives, is not on this machine" in capsys.readouterr().out
    assert not Path(tmp_path / "run/mined").exists()
