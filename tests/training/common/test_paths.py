"""Relative paths: what a recipe reads starts at its own folder, what it writes at the working directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.training.recipes import ONE_STAGE, recipe_writer, write_recipe
from training.common.yaml_file import RULE
from training.config.recipe import Stage, load_recipe, read_stages
from training.run_stage import main
from training.stages.continuation import check_keys

READ = {
    "manifest": "data/m.yaml",
    "data_dir": "data",
    "evaluation_pairs": "p.parquet",
    "evaluation_candidates": "c.parquet",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes recipes into ``project``; the working directory is ``here``, beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write = recipe_writer(tmp_path / "project")
    return lambda keys, name="recipe.yaml", base=ONE_STAGE: write({**base, **keys}, name, base={})


def stage_keys(path, **overrides):
    return load_recipe(path, {"use_cpu": True, **overrides}).stages[-1].keys


def test_what_is_read_starts_at_the_file(write, monkeypatch):
    path = write(READ)
    keys = stage_keys(path)
    assert {key: keys[key] for key in READ} == {key: f"../project/{path}" for key, path in READ.items()}
    assert all(type(keys[key]) is str for key in READ)
    # The files are the same from everywhere, and the command line is the user's own place.
    assert stage_keys(path, manifest="own.yaml")["manifest"] == "own.yaml"
    for place in (".", "x/.."):
        assert stage_keys(path, output_dir=place)["manifest"] == "../project/data/m.yaml"
    monkeypatch.chdir(path.parent)
    assert stage_keys(Path("recipe.yaml")).items() >= READ.items()


def test_settings_of_sharding_start_at_the_file(write):
    (keys,) = read_stages(write({"fsdp_config": "fsdp.json", "deepspeed": "zero.json"}), {})[1].values()
    assert (keys["fsdp_config"], keys["deepspeed"]) == ("../project/fsdp.json", "../project/zero.json")
    (keys,) = read_stages(write({"fsdp_config": '{"version": 2}'}), {})[1].values()
    assert keys["fsdp_config"] == '{"version": 2}'


def test_what_is_written_starts_at_the_working_directory(write):
    written = {"output_dir": "out", "prepared_dir": "prepared", "teacher_cache_dir": "cache"}
    below = {"evaluation_pairs": "out/pairs.parquet", "manifest": "./out/data/m.yaml"}
    keys = stage_keys(write({**written, **below, "teacher": "some/teacher"}))
    assert {key: keys[key] for key in (*written, *below)} == {**written, **below}
    # Where the recipe writes by itself: what lies there stays where it is if the output is moved.
    assert stage_keys(write({**below, "output_dir": "out"}), output_dir="other")["manifest"] == "./out/data/m.yaml"


def test_what_a_builder_makes_is_written(write):
    built = {"builder": "gettext", "manifest": "built/m.yaml", "evaluation_pairs": "built/pairs.parquet"}
    options = {"locale_dirs": ["mine", "/usr/share/locale"]}
    for given in (options, json.dumps(options)):
        keys = stage_keys(write({**built, "builder_options": given, "evaluation_candidates": "c.parquet"}))
        assert keys.items() >= built.items() and keys["evaluation_candidates"] == "../project/c.parquet"
        assert keys["builder_options"] == {"locale_dirs": ["../project/mine", "/usr/share/locale"]}


@pytest.mark.parametrize("key", ["model", "teacher", "tokenizer"])
def test_models_beside_the_recipe_come_first(write, tmp_path, key):
    path = write({key: "some/model"})
    assert stage_keys(path)[key] == "some/model"
    (tmp_path / "project" / "some" / "model").mkdir(parents=True)
    assert stage_keys(path)[key] == "../project/some/model"
    assert stage_keys(path, **{key: "some/model"})[key] == "some/model"


def test_what_is_not_a_relative_path_stays(write, tmp_path):
    keys = {"data_dir": "hf://datasets/a/b", "manifest": "/data/m.yaml", "output_dir": "/out"}
    assert stage_keys(write(keys)).items() >= keys.items()
    (tmp_path / "project" / "train").mkdir(parents=True)
    keys = {"model": None, "model_config": {"hidden_size": 8}, "tokenizer": "train"}
    assert stage_keys(write(keys))["tokenizer"] == "train"


def test_each_file_of_a_chain_has_its_own_folder(write):
    write({"manifest": "m.yaml", "evaluation_pairs": "p.parquet"}, "family/base.yaml")
    write({"extends": "family/base.yaml", "data_dir": "data"}, "middle.yaml", base={})
    write({"extends": "../middle.yaml", "evaluation_pairs": "own.parquet"}, "own/leaf.yaml", base={})
    path = write({"stages": {"a": {"extends": "own/leaf.yaml", "evaluation_candidates": "c.parquet"}}})
    expected = ("family/m.yaml", "data", "own/own.parquet", "c.parquet")
    keys = stage_keys(path)
    assert [keys[key] for key in READ] == [f"../project/{each}" for each in expected]


def test_past_a_link_the_path_still_leads_to_the_file(write, tmp_path):
    real = write({"manifest": "../data/m.yaml"}, "deep/er/recipe.yaml")
    (tmp_path / "here" / "link").symlink_to(real.parent)
    keys = stage_keys(Path("link/recipe.yaml"))
    assert Path(keys["manifest"]).resolve() == tmp_path / "project" / "deep" / "data" / "m.yaml"


@pytest.mark.parametrize("key", ["manifest", "model"])
def test_a_missing_path_tells_the_rule(tmp_path, monkeypatch, capsys, key):
    path = write_recipe(tmp_path / "project", **{key: "no/such/thing"})
    content = yaml.safe_load(path.read_text())
    content["stages"]["stage2"].pop("model")
    del content["stages"]["stage1"]
    path.write_text(yaml.safe_dump({"model": "m/x", **content}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").touch()
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert RULE in error
    assert ("project/no/such/thing" if key == "manifest" else "no/such/thing") in error


def test_a_run_is_the_same_from_every_working_directory(write, tmp_path, monkeypatch, refuses):
    path = write({"output_dir": "runs/x", "manifest": "m.yaml", "model": "Org/model", "teacher": "runs/big/model"})
    (stage,) = load_recipe(path).stages
    run = tmp_path / "here" / "runs" / "x"
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


def test_a_recipe_beside_that_cannot_be_read_is_passed_over(write, capsys, tmp_path):
    (tmp_path / "project" / "folder.yaml").mkdir(parents=True)
    assert main([str(write({"manifest": "m.yaml", "model": "no/such/model"}))]) == 2
    assert "'no/such/model' is missing" in capsys.readouterr().err
