"""Recipes of several files and stages: what extends, and what names of stages and folders come to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import training
from tests.training.recipes import ONE_STAGE, only_stage, recipe_writer
from training.config.recipe import command_line_overrides, load_recipe

QUICKSTART = Path(training.__file__).parent / "recipes" / "quickstart" / "recipe.yaml"
Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path)


# Extends


def test_extends_replaces_keys_of_the_other_file(write: Callable[..., Path]) -> None:
    write({"seed": 1, "cap": 10, "max_length": 99}, "family/base.yaml")
    write({"extends": "family/base.yaml", "seed": 2}, "middle.yaml", base={})
    path = write({"extends": "../middle.yaml", "cap": None, "temperature": 0.1}, "own/recipe.yaml", base={})
    recipe = load_recipe(path)
    arguments = only_stage(recipe)
    assert (arguments.seed, arguments.cap, arguments.max_length, arguments.temperature) == (2, None, 99, 0.1)
    assert recipe.path == path
    assert "extends" not in recipe.stages[0].keys


def test_extends_an_absolute_path(write: Callable[..., Path]) -> None:
    base = write({"seed": 7}, "elsewhere/base.yaml")
    assert only_stage(load_recipe(write({"extends": str(base)}, base={}))).seed == 7


def test_extends_inherits_stages(write: Callable[..., Path]) -> None:
    write({"stages": {"first": {"seed": 1}, "second": {"model": "first"}}}, "base.yaml")
    recipe = load_recipe(write({"extends": "base.yaml", "max_length": 9}, base={}))
    assert [(stage.name, stage.arguments.max_length) for stage in recipe.stages] == [("first", 9), ("second", 9)]


def test_extends_one_file_from_two_branches_is_no_cycle(write: Callable[..., Path]) -> None:
    write({"seed": 1}, "base.yaml")
    for name in ("a.yaml", "b.yaml"):
        assert only_stage(load_recipe(write({"extends": "base.yaml"}, name, base={}))).seed == 1


@pytest.mark.parametrize("length", [1, 2, 3])
def test_extends_in_a_circle(write: Callable[..., Path], refuses: Refuses, length: int) -> None:
    for number in range(length):
        path = write({"extends": f"{(number + 1) % length}.yaml"}, f"{number}.yaml")
    with refuses(path.parent, ".yaml", "extends itself"):
        load_recipe(path)


def test_extends_in_a_circle_through_another_spelling(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({"extends": "../deep/recipe.yaml"}, "deep/recipe.yaml")
    with refuses("recipe.yaml", "extends itself"):
        load_recipe(path)


def test_extends_a_missing_file(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({"extends": "none.yaml"})
    with refuses(path.parent / "none.yaml", "no such file"):
        load_recipe(path)


def test_unknown_key_in_an_extended_file_names_that_file(write: Callable[..., Path], refuses: Refuses) -> None:
    base = write({"sed": 1}, "base.yaml")
    with refuses(base, "'sed'", "'seed'"):
        load_recipe(write({"extends": "base.yaml"}))


# Stages


def test_stages_inherit_shared_keys_and_have_folders_of_their_own(write: Callable[..., Path]) -> None:
    shared = {"seed": 5, "max_length": 99, "cap": 7}
    stages = {"first": {"max_length": 11}, "second": {"cap": None}, "third": {"output_dir": "elsewhere"}}
    recipe = load_recipe(write({**shared, "stages": stages}))
    assert [stage.name for stage in recipe.stages] == ["first", "second", "third"]
    arguments = [stage.arguments for stage in recipe.stages]
    assert [a.seed for a in arguments] == [5, 5, 5]
    assert [a.max_length for a in arguments] == [11, 99, 99]
    assert [a.cap for a in arguments] == [7, None, 7]
    assert [a.output_dir for a in arguments] == ["runs/x/first", "runs/x/second", "elsewhere"]
    assert all("stages" not in stage.keys for stage in recipe.stages)


def test_model_names_an_earlier_stage(write: Callable[..., Path]) -> None:
    stages = {
        "a": {"model": "some/model"},
        "b": {"model": "a", "output_dir": "elsewhere"},
        "c": {"model": "b"},
        "d": {"model": "a"},
        "e": {"model": "a/b"},
    }
    recipe = load_recipe(write({"stages": stages}))
    assert [stage.arguments.model for stage in recipe.stages] == [
        "some/model",
        "runs/x/a/model",
        "elsewhere/model",
        "runs/x/a/model",
        "a/b",
    ]


def test_stage_may_swap_model_and_model_config(write: Callable[..., Path]) -> None:
    stages = {"a": {"model": None, "model_config": {"hidden_size": 8}}, "b": {"model": "a"}}
    first, second = load_recipe(write({"stages": stages})).stages
    assert (first.arguments.model, first.arguments.model_config_fields()) == (None, {"hidden_size": 8})
    assert (second.arguments.model, second.arguments.model_config) == ("runs/x/a/model", None)


def test_quickstart_loads() -> None:
    first, second, pruned, student = load_recipe(QUICKSTART).stages
    assert [stage.name for stage in (first, second, pruned, student)] == ["stage1", "stage2", "pruned", "student"]
    assert pruned.arguments.prunes and student.arguments.teacher == "runs/quickstart/stage2/model"
    assert student.arguments.prepared_dir == "runs/quickstart/stage2/prepared"
    assert second.arguments.model == "runs/quickstart/stage1/model"
    assert first.arguments.lr_scheduler_kwargs == second.arguments.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert (first.arguments.instructions, second.arguments.instructions) == (False, True)
    assert first.arguments.model_config_fields()["hidden_size"] == 128


@pytest.mark.parametrize("stages", [["a", "b"], "a", {"a": None}, {"a": {"seed": 1}, "b": ["seed"]}])
def test_stages_that_are_no_mappings(write: Callable[..., Path], refuses: Refuses, stages: Any) -> None:
    path = write({"stages": stages})
    with refuses(path, "'stages'"):
        load_recipe(path)


def test_no_stages(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({"stages": {}})
    with refuses(path, "'stages'"):
        load_recipe(path)


@pytest.mark.parametrize("name", [1, True, None, "a/b", "/root", "..", ""])
def test_name_that_is_no_folder_name(write: Callable[..., Path], refuses: Refuses, name: Any) -> None:
    path = write({"stages": {"first": {}, name: {"seed": 1}}})
    with refuses(path, f"stage {name!r}", "folder"):
        load_recipe(path)


@pytest.mark.parametrize("key", ["model", "output_dir"])
def test_list_where_one_name_is_wanted(write: Callable[..., Path], refuses: Refuses, key: str) -> None:
    for keys in ({key: ["b"]}, {key: ["b"], "stages": {"a": {}}}, {"stages": {"a": {key: ["b"]}}}):
        path = write({**ONE_STAGE, **keys}, base={})
        with refuses(path, repr(key), "['b']"):
            load_recipe(path)


@pytest.mark.parametrize("key", ["model", "output_dir"])
@pytest.mark.parametrize("keys", [{}, {"stages": {"a": {}}}])
def test_two_overrides_where_one_name_is_wanted(
    write: Callable[..., Path], refuses: Refuses, keys: dict[str, Any], key: str
) -> None:
    with refuses(repr(key), "['b', 'c']"):
        load_recipe(write(keys), command_line_overrides([f"--{key}", "b", "c"]))


@pytest.mark.parametrize("keys", [{}, {"stages": {"a": {}}}])
def test_folder_may_be_named_by_a_number(write: Callable[..., Path], keys: dict[str, Any]) -> None:
    recipe = load_recipe(write({**ONE_STAGE, "output_dir": 5, **keys}, base={}))
    assert recipe.output_dir == Path("5")
    assert only_stage(recipe).output_dir == ("5/a" if keys else "5")


def test_what_earlier_stages_leave_is_named_by_them(write: Callable[..., Path]) -> None:
    later = {key: "first" for key in ("model", "tokenizer", "importance", "prepared_dir")}
    later["prune_to"] = {"hidden_size": 8}
    content = {"output_dir": "out", "stages": {"first": {"model": "x"}, "b": later}}
    keys = load_recipe(write(content, base={})).stages[1].keys
    assert (keys["tokenizer"], keys["importance"]) == ("out/first/model", "out/first")
    assert keys["prepared_dir"] == "out/first/prepared"


def test_a_stage_may_be_called_train_and_train_a_tokenizer(write: Callable[..., Path]) -> None:
    stages = {"train": {"tokenizer": "train", "model_config": {"hidden_size": 8}}}
    path = write({"output_dir": "out", "stages": stages}, base={})
    assert load_recipe(path).stages[0].keys["tokenizer"] == "train"


@pytest.mark.parametrize("stage", ["a", "b"])
def test_model_names_its_own_or_a_later_stage(write: Callable[..., Path], refuses: Refuses, stage: str) -> None:
    path = write({"stages": {"a": {"model": stage}, "b": {}}})
    with refuses(path, "stage 'a'", f"model {stage!r}", "has not run"):
        load_recipe(path)


def test_stage_extends_a_recipe_of_one_stage(write: Callable[..., Path]) -> None:
    write({"seed": 1, "cap": 10, "max_length": 99}, "sizes/base.yaml")
    write({"extends": "base.yaml", "output_dir": "runs/alone", "seed": 2, "cap": 7}, "sizes/small.yaml", base={})
    stages = {"a": {"extends": "sizes/small.yaml", "cap": 3}, "b": {"extends": "sizes/small.yaml", "model": "a"}}
    recipe = load_recipe(write({"seed": 5, "temperature": 0.5, "stages": stages}))
    first, second = (stage.arguments for stage in recipe.stages)
    assert (first.seed, first.cap, first.max_length, first.temperature) == (2, 3, 99, 0.5)
    assert (first.model, second.model, second.cap) == ("some/model", "runs/x/a/model", 7)
    # Where the other recipe writes by itself says nothing of where the stage does; overrides move all.
    assert [stage.arguments.output_dir for stage in recipe.stages] == ["runs/x/a", "runs/x/b"]
    assert all("extends" not in stage.keys for stage in recipe.stages)
    moved = load_recipe(recipe.path, {"output_dir": "other", "seed": "9"})
    assert [(stage.arguments.output_dir, stage.arguments.seed) for stage in moved.stages] == [
        ("other/a", 9),
        ("other/b", 9),
    ]


def test_what_a_stage_extends_lies_beside_the_file_that_says_so(write: Callable[..., Path]) -> None:
    write({"seed": 7}, "family/small.yaml")
    write({"stages": {"a": {"extends": "small.yaml"}}}, "family/all.yaml")
    assert only_stage(load_recipe(write({"extends": "family/all.yaml"}, base={}))).seed == 7


def test_stage_extends_a_missing_file(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({"stages": {"a": {"extends": "b.yaml"}}})
    with refuses(path, "stage 'a'", path.parent / "b.yaml", "no such file"):
        load_recipe(path)


def test_stage_extends_its_own_recipe(write: Callable[..., Path], refuses: Refuses) -> None:
    write({"extends": "recipe.yaml"}, "b.yaml")
    for base in ("recipe.yaml", "b.yaml"):
        path = write({"stages": {"a": {"extends": base}}})
        with refuses(path, "stage 'a'", "extends itself"):
            load_recipe(path)


def test_stage_extends_a_recipe_with_an_unknown_key(write: Callable[..., Path], refuses: Refuses) -> None:
    base = write({"sed": 1}, "base.yaml")
    path = write({"stages": {"a": {"extends": "base.yaml"}}})
    with refuses(path, "stage 'a'", base, "'sed'", "'seed'"):
        load_recipe(path)


def test_stage_extends_a_recipe_with_stages(write: Callable[..., Path], refuses: Refuses) -> None:
    write({"stages": {"b": {}}}, "base.yaml")
    path = write({"stages": {"a": {"extends": "base.yaml"}}})
    with refuses(path, "stage 'a'", "base.yaml", "has stages"):
        load_recipe(path)


def test_stages_inside_a_stage(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({"stages": {"a": {"stages": {"b": {}}}}})
    with refuses(path, "unknown key 'stages'"):
        load_recipe(path)
