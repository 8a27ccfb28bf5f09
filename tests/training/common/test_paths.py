"""Relative paths of recipes: what lies beside the file is read there, all else starts at the working directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.training.recipes import error_of, recipe_writer
from training.common.yaml_file import RULE
from training.config.recipe import Stage, load_recipe
from training.stages.continuation import check_keys

READ = {
    **{
        "manifest": "data/m.yaml",
        "data_dir": "data",
        "evaluation_pairs": "p.parquet",
        "evaluation_candidates": "c.csv",
    },
    **{"model": "some/model", "teacher": "some/teacher"},
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes recipes into ``project``; the working directory is ``here``, beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return recipe_writer(tmp_path / "project")


def make(*paths):
    for path in paths:
        Path("../project", path).parent.mkdir(parents=True, exist_ok=True)
        Path("../project", path).touch()


def keys_of(path, **overrides):
    (stage,) = load_recipe(path, overrides).stages
    return stage.keys


def test_what_lies_beside_the_file_is_read_there(write, monkeypatch):
    path = write(READ)
    # Nothing is there: the working directory, or the Hub.
    assert keys_of(path).items() >= READ.items()
    make("data/m.yaml", "p.parquet", "c.csv", "some/model", "some/teacher")
    keys = keys_of(path)
    assert {key: keys[key] for key in READ} == {key: f"../project/{path}" for key, path in READ.items()}
    # Paths of the command line start at the working directory.
    assert keys_of(path, manifest="data/m.yaml")["manifest"] == "data/m.yaml"
    monkeypatch.chdir(path.parent)
    assert keys_of(Path("recipe.yaml")).items() >= READ.items()


def test_what_is_written_starts_at_the_working_directory(write):
    written = {"output_dir": "out", "prepared_dir": "prepared", "teacher_cache_dir": "cache", "teacher": "some/teacher"}
    make("out/x", "prepared/x", "cache/x")
    assert keys_of(write(written)).items() >= written.items()


@pytest.mark.parametrize("form", [dict, json.dumps])
def test_folders_of_a_builder_are_read_beside_the_file(write, form):
    make("mine/x")
    options = {"locale_dirs": ["mine", "/usr/share/locale", "other"]}
    keys = keys_of(write({"builder": "gettext", "manifest": "built/m.yaml", "builder_options": form(options)}))
    assert keys["builder_options"] == {"locale_dirs": ["../project/mine", "/usr/share/locale", "other"]}
    assert keys["manifest"] == "built/m.yaml"


def test_what_is_not_a_relative_path_stays(write):
    keys = {"data_dir": "hf://datasets/a/b", "manifest": "/data/m.yaml", "fsdp": True, "fsdp_config": '{"version": 2}'}
    assert keys_of(write(keys)).items() >= keys.items()
    make("train/x", "first/x")
    new = {"model": None, "model_config": {"hidden_size": 8}, "tokenizer": "train"}
    assert keys_of(write(new))["tokenizer"] == "train"
    # The name of a stage comes before a folder beside the recipe.
    stages = {"first": {"model": "some/model"}, "second": {"model": "first"}}
    for recipe in (write({"stages": stages}, "a.yaml"), write({"extends": "a.yaml", "teacher": "first"}, base={})):
        assert load_recipe(recipe, {"teacher": None}).stages[1].keys["model"] == "runs/x/first/model"


def test_each_file_of_a_chain_has_its_own_folder(write):
    write({"manifest": "m.yaml", "evaluation_pairs": "p.parquet"}, "family/base.yaml")
    write({"extends": "family/base.yaml", "data_dir": "data"}, "middle.yaml", base={})
    write({"extends": "../middle.yaml", "evaluation_pairs": "own.parquet"}, "own/leaf.yaml", base={})
    path = write({"stages": {"a": {"extends": "own/leaf.yaml", "evaluation_candidates": "c.parquet"}}})
    make("family/m.yaml", "data/x", "own/own.parquet", "c.parquet")
    keys, expected = keys_of(path), ("family/m.yaml", "data", "own/own.parquet", "c.parquet")
    assert [keys[key] for key in list(READ)[:4]] == [f"../project/{each}" for each in expected]


def test_past_a_link_the_path_still_leads_to_the_file(write, tmp_path):
    real = write({"manifest": "../data/m.yaml"}, "deep/er/recipe.yaml")
    make("deep/data/m.yaml")
    (tmp_path / "here/link").symlink_to(real.parent)
    keys = keys_of(Path("link/recipe.yaml"))
    assert Path(keys["manifest"]).resolve() == tmp_path / "project/deep/data/m.yaml"


def test_a_missing_model_tells_the_rule(write, capsys):
    (Path("../project") / "folder.yaml").mkdir(parents=True)
    error = error_of([write({"manifest": "m.yaml", "model": "no/such/model"})], capsys)
    assert "model 'no/such/model' is missing" in error and RULE in error


def test_a_run_is_the_same_from_every_working_directory(write, tmp_path, monkeypatch, refuses):
    path = write({"output_dir": "runs/x", "manifest": "m.yaml", "model": "Org/model", "teacher": "runs/big/model"})
    make("m.yaml")
    (stage,) = load_recipe(path).stages
    run = tmp_path / "here/runs/x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(stage.keys))
    monkeypatch.chdir(tmp_path)
    elsewhere = {"output_dir": "here/runs/x", "teacher": "here/runs/big/model"}
    (again,) = load_recipe(path, elsewhere).stages
    assert again.keys["manifest"] != stage.keys["manifest"]
    assert check_keys(run, again, accept_changes=False) == {}
    for key in ("manifest", "teacher", "model"):
        changed = Stage("x", {**again.keys, key: "other/model"}, again.arguments)
        with refuses(run, key):
            check_keys(run, changed, accept_changes=False)
