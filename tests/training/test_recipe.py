"""Recipes: what extends, stages, overrides and YAML's ways of writing values come to, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

import training
from training.arguments import StageArguments
from training.recipe import Recipe, command_line_overrides, load_recipe, recipe_help

QUICKSTART = Path(training.__file__).parent / "recipes" / "quickstart" / "recipe.yaml"
BASE = {"output_dir": "runs/x", "model": "some/model", "use_cpu": True}
Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of the keys given, or of YAML text after the usual keys."""

    def write(keys: dict[str, Any] | str, name: str = "recipe.yaml", base: dict[str, Any] = BASE) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        text = keys if isinstance(keys, str) else yaml.safe_dump(keys, sort_keys=False)
        path.write_text((yaml.safe_dump(base) if base else "") + (text if keys else ""))
        return path

    return write


def only(recipe: Recipe) -> StageArguments:
    (stage,) = recipe.stages
    return stage.arguments


# One stage, and how YAML values arrive


def test_recipe_without_stages_is_one_stage(write: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write({"seed": 3}, "small.yaml")))
    (stage,) = recipe.stages
    assert stage.name == "small"
    assert stage.keys == {**BASE, "seed": 3}
    assert isinstance(stage.arguments, StageArguments)
    assert (stage.arguments.output_dir, stage.arguments.model, stage.arguments.seed) == ("runs/x", "some/model", 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("1E-5", 1e-5), ("0.00001", 1e-5), ("2", 2.0), ("'3e-4'", 3e-4), (".5", 0.5)],
)
def test_numbers_arrive_as_floats(write: Callable[..., Path], text: str, expected: float) -> None:
    value = only(load_recipe(write(f"learning_rate: {text}\n"))).learning_rate
    assert type(value) is float
    assert value == expected


@pytest.mark.parametrize("text", ["1.0e-5", "1e-5"])
def test_numbers_in_a_mapping_arrive_as_floats(write: Callable[..., Path], text: str) -> None:
    arguments = only(load_recipe(write(f"lr_scheduler_kwargs: {{min_lr: {text}}}\n")))
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize(("text", "expected"), [("-1", -1), ("0", 0), ("12", 12), ("'12'", 12), ("1_000", 1000)])
def test_integers(write: Callable[..., Path], text: str, expected: int) -> None:
    assert only(load_recipe(write(f"max_steps: {text}\n"))).max_steps == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("false", False), ("yes", True), ("no", False), ("on", True), ("'false'", False), ("0", False)],
)
def test_booleans(write: Callable[..., Path], text: str, expected: bool) -> None:
    arguments = only(load_recipe(write(f"matryoshka: {text}\nmask_duplicates: {text}\n")))
    assert (arguments.matryoshka, arguments.mask_duplicates) == (expected, expected)


def test_lists(write: Callable[..., Path]) -> None:
    told = {"sources": ["web_*", "sts"], "task_types": ["retrieval"], "matryoshka_dimensions": [64, 32]}
    arguments = only(load_recipe(write(told)))
    assert {key: getattr(arguments, key) for key in told} == told


def test_single_value_is_a_list_of_one(write: Callable[..., Path]) -> None:
    arguments = only(load_recipe(write({"sources": "web_*", "matryoshka_dimensions": 64})))
    assert (arguments.sources, arguments.matryoshka_dimensions) == (["web_*"], [64])


def test_mapping_arrives_whole(write: Callable[..., Path]) -> None:
    config = {
        "hidden_size": 64,
        "rms_norm_eps": 0.5,
        "layer_types": None,
        "family": "größer",
        "tie_word_embeddings": True,
    }
    arguments = only(load_recipe(write({"output_dir": "x", "model_config": config}, base={})))
    assert arguments.model_config_fields() == config


@pytest.mark.parametrize(
    "text",
    ['Größe "東京": a=b, {x}\nsecond line', "--looks like a key", "-dash", "--dash", "--seed", ""],
)
def test_text_arrives_as_written(write: Callable[..., Path], text: str) -> None:
    assert only(load_recipe(write({"query_instruction": text}))).query_instruction == text
    overrides = command_line_overrides([f"--query_instruction={text}"])
    assert only(load_recipe(write({}), overrides)).query_instruction == text


def test_null_means_the_default(write: Callable[..., Path]) -> None:
    arguments = only(load_recipe(write({"cap": None, "seed": None, "matryoshka": None})))
    assert (arguments.cap, arguments.seed, arguments.matryoshka) == (None, 42, True)


# Extends


def test_extends_replaces_keys_of_the_other_file(write: Callable[..., Path]) -> None:
    write({"seed": 1, "cap": 10, "max_length": 99}, "family/base.yaml")
    write({"extends": "family/base.yaml", "seed": 2}, "middle.yaml", base={})
    path = write({"extends": "../middle.yaml", "cap": None, "temperature": 0.1}, "own/recipe.yaml", base={})
    recipe = load_recipe(path)
    arguments = only(recipe)
    assert (arguments.seed, arguments.cap, arguments.max_length, arguments.temperature) == (2, None, 99, 0.1)
    assert recipe.path == path
    assert "extends" not in recipe.stages[0].keys


def test_extends_an_absolute_path(write: Callable[..., Path]) -> None:
    base = write({"seed": 7}, "elsewhere/base.yaml")
    assert only(load_recipe(write({"extends": str(base)}, base={}))).seed == 7


def test_extends_inherits_stages(write: Callable[..., Path]) -> None:
    write({"stages": {"first": {"seed": 1}, "second": {"model": "first"}}}, "base.yaml")
    recipe = load_recipe(write({"extends": "base.yaml", "max_length": 9}, base={}))
    assert [(stage.name, stage.arguments.max_length) for stage in recipe.stages] == [("first", 9), ("second", 9)]


def test_extends_one_file_from_two_branches_is_no_cycle(write: Callable[..., Path]) -> None:
    write({"seed": 1}, "base.yaml")
    for name in ("a.yaml", "b.yaml"):
        assert only(load_recipe(write({"extends": "base.yaml"}, name, base={}))).seed == 1


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
        path = write({**BASE, **keys}, base={})
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
    recipe = load_recipe(write({**BASE, "output_dir": 5, **keys}, base={}))
    assert recipe.output_dir == Path("5")
    assert only(recipe).output_dir == ("5/a" if keys else "5")


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
    assert only(load_recipe(write({"extends": "family/all.yaml"}, base={}))).seed == 7


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


# Overrides


def test_overrides_replace_keys(write: Callable[..., Path]) -> None:
    overrides = command_line_overrides(
        ["--seed", "9", "--learning_rate=1e-5", "--sources", "a", "b", "--matryoshka=no"]
    )
    arguments = only(load_recipe(write({"seed": 1, "sources": ["x"]}), overrides))
    assert (arguments.seed, arguments.learning_rate, arguments.sources) == (9, 1e-5, ["a", "b"])
    assert arguments.matryoshka is False


def test_overrides_replace_keys_of_every_stage(write: Callable[..., Path]) -> None:
    path = write({"seed": 1, "stages": {"a": {"seed": 2, "cap": 3}, "b": {"model": "a"}}})
    recipe = load_recipe(path, {"seed": "9", "cap": "4"})
    assert [(stage.arguments.seed, stage.arguments.cap) for stage in recipe.stages] == [(9, 4), (9, 4)]


def test_overridden_output_dir_moves_all_stages(write: Callable[..., Path]) -> None:
    path = write({"stages": {"a": {}, "b": {"model": "a"}, "c": {"model": "b", "output_dir": "elsewhere"}}})
    stages = load_recipe(path, {"output_dir": "other"}).stages
    assert [stage.arguments.output_dir for stage in stages] == ["other/a", "other/b", "elsewhere"]
    assert [stage.arguments.model for stage in stages] == ["some/model", "other/a/model", "other/b/model"]
    assert only(load_recipe(write({}), {"output_dir": "other"})).output_dir == "other"


def test_override_may_give_the_output_dir_that_the_recipe_lacks(write: Callable[..., Path]) -> None:
    for keys in ({"model": "m"}, {"model": "m", "stages": {"a": {}}}):
        assert only(load_recipe(write(keys, base={}), {"output_dir": "x"})).output_dir.startswith("x")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--seed", "9"], {"seed": "9"}),
        (["--seed=9"], {"seed": "9"}),
        (["--max-length", "9"], {"max_length": "9"}),
        (["--max_steps", "-1"], {"max_steps": "-1"}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "--seed", "9"], {"bf16": True, "seed": "9"}),
        (["--bf16", "false"], {"bf16": "false"}),
        (["--sources", "a", "b", "--seed=9"], {"sources": ["a", "b"], "seed": "9"}),
        (["--query_instruction=a=b"], {"query_instruction": "a=b"}),
        (["--query_instruction="], {"query_instruction": ""}),
        (["--seed", "1", "--seed", "2"], {"seed": "2"}),
    ],
)
def test_command_line(words: list[str], expected: dict[str, Any]) -> None:
    assert command_line_overrides(words) == expected


@pytest.mark.parametrize("word", ["--learning_rat=1", "--learning-rat"])
def test_unknown_key_on_the_command_line(refuses: Refuses, word: str) -> None:
    with refuses("command line", "'learning_rat'", "did you mean 'learning_rate'?"):
        command_line_overrides([word, "1"])


@pytest.mark.parametrize("words", [["recipe2.yaml"], ["-x", "1"], ["9", "--seed"]])
def test_word_without_a_key(refuses: Refuses, words: list[str]) -> None:
    with refuses("command line", repr(words[0])):
        command_line_overrides(words)


def test_wrong_value_on_the_command_line(write: Callable[..., Path], refuses: Refuses) -> None:
    with refuses("--seed", "'nine'"):
        load_recipe(write({}), command_line_overrides(["--seed=nine"]))


# Faults


def test_missing_recipe(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(tmp_path / "none.yaml", "no such file"):
        load_recipe(tmp_path / "none.yaml")


def test_recipe_that_is_no_yaml(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write("stages: [\n")
    with refuses(path, "not valid YAML"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'?"),
        ({"stages": {"a": {"tokeniser": "train"}}}, "did you mean 'tokenizer'?"),
        ({"global-batch-size": 8}, "did you mean 'global_batch_size'?"),
        ({"extend": "x.yaml"}, "did you mean 'extends'?"),
        ({"stage": {}}, "did you mean 'stages'?"),
        ({"qqq": 1}, "--help lists"),
        ({1: 1}, "--help lists"),
        ({True: 1}, "--help lists"),
    ],
)
def test_unknown_key(write: Callable[..., Path], refuses: Refuses, keys: dict[Any, Any], remedy: str) -> None:
    path = write(keys)
    with refuses(path, "unknown key", remedy):
        load_recipe(path)


@pytest.mark.parametrize("keys", [{"model": "m"}, {"model": "m", "stages": {"a": {}}}, {**BASE, "output_dir": None}])
def test_missing_output_dir(write: Callable[..., Path], refuses: Refuses, keys: dict[str, Any]) -> None:
    path = write(keys, base={})
    with refuses(path, "'output_dir'", "missing"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("learning_rate", "fast", "'fast'"),
        ("learning_rate", {"a": 1}, '{"a": 1}'),
        ("learning_rate", [0.1, 0.2], "0.2"),
        ("global_batch_size", "many", "'many'"),
        ("global_batch_size", 2.5, "'2.5'"),
        ("cap", "1e4", "'10000.0'"),  # written without quotes: a number with a fraction
        ("seed", True, "'true'"),
        ("matryoshka", "maybe", "maybe"),
        ("matryoshka", 2, "2"),
        ("matryoshka_dimensions", [64, "x"], "'x'"),
        ("task_types", [], "at least one"),
        ("eval_strategy", "sometimes", "'sometimes'"),
        ("lr_scheduler_type", "round", "'round'"),
    ],
)
def test_wrong_value(write: Callable[..., Path], refuses: Refuses, key: str, value: Any, shown: str) -> None:
    path = write({"stages": {"first": {key: value}}})
    with refuses(path, "stage 'first'", key, shown):
        load_recipe(path)


@pytest.mark.parametrize("key", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_batches_per_device_are_refused(write: Callable[..., Path], refuses: Refuses, key: str) -> None:
    path = write({key: 2})
    with refuses(path, "stage 'recipe'", key, "'global_batch_size'"):
        load_recipe(path)


@pytest.mark.parametrize("keys", [{}, {"model": "m", "model_config": {"hidden_size": 8}}])
def test_model_and_model_config_are_alternatives(
    write: Callable[..., Path], refuses: Refuses, keys: dict[str, Any]
) -> None:
    path = write({"output_dir": "x", **keys}, base={})
    with refuses(path, "'model'", "'model_config'", "exactly one"):
        load_recipe(path)


def test_fault_in_a_later_stage_is_found_before_anything_runs(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({"stages": {"first": {}, "second": {"temperature": 0}}})
    with refuses(path, "stage 'second'", "'temperature'"):
        load_recipe(path)


@pytest.mark.parametrize("config", ["{", "[1]"])
def test_model_config_that_is_no_mapping(write: Callable[..., Path], refuses: Refuses, config: str) -> None:
    path = write({"output_dir": "x", "model_config": config}, base={})
    with refuses(path, "'model_config'"):
        load_recipe(path)


def test_field_that_a_model_does_not_have(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write({"output_dir": "x", "model_config": {"hiddensize": 64}}, base={})
    with refuses(path, "stage 'recipe'", "'model_config'", "'hiddensize'", "did you mean 'hidden_size'?"):
        load_recipe(path)


def test_caps_of_sources(write: Callable[..., Path], refuses: Refuses) -> None:
    arguments = only(load_recipe(write({"source_caps": {"web_*": 5}})))
    assert (arguments.cap_of("web_kor"), arguments.cap_of("sts")) == (5, None)
    path = write("source_caps: {sts: 7, web_*: 1e4}\n")
    with refuses(path, "stage 'recipe'", "'source_caps'", "'web_*'", "10000.0"):
        load_recipe(path)


def test_key_that_stands_twice(write: Callable[..., Path], refuses: Refuses) -> None:
    path = write("stages:\n  a: {seed: 1}\n  a: {seed: 2}\n")
    with refuses(path, "'a'", "twice"):
        load_recipe(path)


def test_help_describes_every_key() -> None:
    text = recipe_help()
    for key in ("--global_batch_size", "--manifest", "--learning_rate", "--mask_duplicates"):
        assert key in text
    assert "Divisor of the cosines." in text
