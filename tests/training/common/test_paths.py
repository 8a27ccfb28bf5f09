"""Relative paths: what a recipe reads starts at its own folder, what it writes at the working directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training.recipes import ONE_STAGE, recipe_writer, write_recipe
from training.common.run_folder import from_run
from training.common.yaml_file import RULE
from training.config.recipe import Stage, load_recipe, read_stages
from training.run_stage import main
from training.stages.continuation import check_keys

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes recipes into ``project``; the working directory is ``here``, beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write = recipe_writer(tmp_path / "project")
    return lambda keys, name="recipe.yaml", base=ONE_STAGE: write({**base, **keys}, name, base={})


def stage_keys(path: Path, **overrides: Any) -> dict[str, Any]:
    return load_recipe(path, {"use_cpu": True, **overrides}).stages[-1].keys


READ = {
    "manifest": "data/m.yaml",
    "data_dir": "data",
    "evaluation_pairs": "p.parquet",
    "evaluation_candidates": "c.parquet",
}


def test_what_is_read_starts_at_the_file(write: Callable[..., Path]) -> None:
    keys = stage_keys(write(READ))
    assert {key: keys[key] for key in READ} == {key: f"../project/{path}" for key, path in READ.items()}
    assert all(type(keys[key]) is str for key in READ)
    # The files are the same from everywhere, and the command line is the user's own place.
    assert stage_keys(write(READ), manifest="own.yaml")["manifest"] == "own.yaml"


def test_settings_of_sharding_start_at_the_file(write: Callable[..., Path]) -> None:
    (keys,) = read_stages(write({"fsdp_config": "fsdp.json", "deepspeed": "zero.json"}), {})[1].values()
    assert (keys["fsdp_config"], keys["deepspeed"]) == ("../project/fsdp.json", "../project/zero.json")
    (keys,) = read_stages(write({"fsdp_config": '{"version": 2}'}), {})[1].values()
    assert keys["fsdp_config"] == '{"version": 2}'


@pytest.mark.parametrize("place", [".", "./", "x/.."])
def test_output_in_the_working_directory(write: Callable[..., Path], place: str) -> None:
    assert stage_keys(write(READ), output_dir=place)["manifest"] == "../project/data/m.yaml"


def test_what_is_written_starts_at_the_working_directory(write: Callable[..., Path]) -> None:
    written = {"output_dir": "out", "prepared_dir": "prepared", "teacher_cache_dir": "cache"}
    below = {"evaluation_pairs": "out/pairs.parquet", "manifest": "./out/data/m.yaml"}
    keys = stage_keys(write({**written, **below, "teacher": "some/teacher"}))
    assert {key: keys[key] for key in (*written, *below)} == {**written, **below}
    # Where the recipe writes by itself: what lies there stays where it is if the output is moved.
    assert stage_keys(write({**below, "output_dir": "out"}), output_dir="other")["manifest"] == "./out/data/m.yaml"


def test_what_a_builder_makes_is_written(write: Callable[..., Path]) -> None:
    built = {"builder": "gettext", "manifest": "built/m.yaml", "evaluation_pairs": "built/pairs.parquet"}
    options = {"builder_options": {"locale_dirs": ["mine", "/usr/share/locale"]}}
    keys = stage_keys(write({**built, **options, "evaluation_candidates": "c.parquet"}))
    assert (keys["manifest"], keys["evaluation_pairs"]) == ("built/m.yaml", "built/pairs.parquet")
    assert keys["evaluation_candidates"] == "../project/c.parquet"
    assert keys["builder_options"] == {"locale_dirs": ["../project/mine", "/usr/share/locale"]}
    as_json = {"builder_options": json.dumps(options["builder_options"])}
    assert stage_keys(write({**built, **as_json}))["builder_options"] == keys["builder_options"]


@pytest.mark.parametrize("key", ["model", "teacher", "tokenizer"])
def test_models_beside_the_recipe_come_first(write: Callable[..., Path], tmp_path: Path, key: str) -> None:
    path = write({key: "some/model"})
    assert stage_keys(path)[key] == "some/model"
    (tmp_path / "project" / "some" / "model").mkdir(parents=True)
    assert stage_keys(path)[key] == "../project/some/model"
    assert stage_keys(path, **{key: "some/model"})[key] == "some/model"


def test_a_tokenizer_to_be_trained_is_not_a_path(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "project" / "train").mkdir(parents=True)
    keys = {"model": None, "model_config": {"hidden_size": 8}, "tokenizer": "train"}
    assert stage_keys(write(keys))["tokenizer"] == "train"


def test_addresses_and_absolute_paths_stay(write: Callable[..., Path]) -> None:
    keys = {"data_dir": "hf://datasets/a/b", "manifest": "/data/m.yaml", "output_dir": "/out"}
    assert stage_keys(write(keys)).items() >= keys.items()


def test_each_file_of_a_chain_has_its_own_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    write({"manifest": "m.yaml", "evaluation_pairs": "p.parquet"}, "family/base.yaml")
    write({"extends": "family/base.yaml", "data_dir": "data"}, "middle.yaml", base={})
    write({"extends": "../middle.yaml", "evaluation_pairs": "own.parquet"}, "own/leaf.yaml", base={})
    path = write({"stages": {"a": {"extends": "own/leaf.yaml", "evaluation_candidates": "c.parquet"}}})
    keys = stage_keys(path)
    assert keys["manifest"] == "../project/family/m.yaml"
    assert keys["data_dir"] == "../project/data"
    assert keys["evaluation_pairs"] == "../project/own/own.parquet"
    assert keys["evaluation_candidates"] == "../project/c.parquet"


def test_past_a_link_the_path_still_leads_to_the_file(write: Callable[..., Path], tmp_path: Path) -> None:
    real = write({"manifest": "../data/m.yaml"}, "deep/er/recipe.yaml")
    (tmp_path / "here" / "link").symlink_to(real.parent)
    keys = stage_keys(Path("link/recipe.yaml"))
    assert Path(keys["manifest"]).resolve() == tmp_path / "project" / "deep" / "data" / "m.yaml"


def test_the_same_from_the_folder_of_the_recipe(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(READ)
    monkeypatch.chdir(path.parent)
    assert stage_keys(Path("recipe.yaml")).items() >= READ.items()


@pytest.mark.parametrize("key", ["manifest", "model"])
def test_a_missing_path_tells_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
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


def test_a_run_is_the_same_from_every_working_directory(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
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


def test_paths_as_a_run_sees_them() -> None:
    keys = {"output_dir": "runs/x", "manifest": "runs/data/m.yaml", "model": "/models/a", "seed": 3}
    assert [from_run(key, keys) for key in keys] == [".", "../data/m.yaml", "/models/a", 3]


@pytest.mark.parametrize("keys", [{"extends": "a"}, {"manifest": "a/m.yaml"}, {"output_dir": "a/x"}, {"model": "a"}])
def test_links_in_a_circle(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, keys: dict[str, str]
) -> None:
    path = write({"manifest": "m.yaml", **keys})
    for folder in (tmp_path / "project", tmp_path / "here"):
        (folder / "a").symlink_to("b")
        (folder / "b").symlink_to("a")
    assert main([str(path)]) in (1, 2)
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(("error: ", "stopped: ")) and "unexpected" not in line


def test_a_recipe_beside_that_cannot_be_read_is_passed_over(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "loop.yaml").symlink_to("loop.yaml")
    assert main([str(write({"manifest": "m.yaml", "model": "no/such/model"}))]) == 2
    assert "'no/such/model' is missing" in capsys.readouterr().err
