"""Recipes of one file: what YAML's ways of writing values and overrides come to, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.training.recipes import ONE_STAGE, only_stage, recipe_writer
from training.config import recipe
from training.config.arguments import StageArguments
from training.config.recipe import command_line_overrides, load_recipe, recipe_help

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path)


# One stage, and how YAML values arrive


def test_recipe_without_stages_is_one_stage(write: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write({"seed": 3}, "small.yaml")))
    (stage,) = recipe.stages
    assert stage.name == "small"
    assert stage.keys == {**ONE_STAGE, "seed": 3}
    assert isinstance(stage.arguments, StageArguments)
    assert (stage.arguments.output_dir, stage.arguments.model, stage.arguments.seed) == ("runs/x", "some/model", 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("1E-5", 1e-5), ("0.00001", 1e-5), ("2", 2.0), ("'3e-4'", 3e-4), (".5", 0.5)],
)
def test_numbers_arrive_as_floats(write: Callable[..., Path], text: str, expected: float) -> None:
    value = only_stage(load_recipe(write(f"learning_rate: {text}\n"))).learning_rate
    assert type(value) is float
    assert value == expected


@pytest.mark.parametrize("text", ["1.0e-5", "1e-5"])
def test_numbers_in_a_mapping_arrive_as_floats(write: Callable[..., Path], text: str) -> None:
    arguments = only_stage(load_recipe(write(f"lr_scheduler_kwargs: {{min_lr: {text}}}\n")))
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("-1", -1), ("12", 12), ("'12'", 12), ("1_000", 1000), ("1e3", 1000), ("1.0e3", 1000), ("2.5E+1", 25), ("7.", 7)],
)
def test_integers(write: Callable[..., Path], text: str, expected: int) -> None:
    assert only_stage(load_recipe(write(f"max_steps: {text}\n"))).max_steps == expected
    overrides = command_line_overrides(["--max_steps", text.strip("'")])
    assert only_stage(load_recipe(write({}), overrides)).max_steps == expected


def test_integers_in_lists_and_mappings(write: Callable[..., Path]) -> None:
    arguments = only_stage(load_recipe(write("matryoshka_dimensions: [6.4e1, 32]\nsource_caps: {web_*: 1e4}\n")))
    assert arguments.matryoshka_dimensions == [64, 32]
    assert arguments.cap_of("web_kor") == 10_000


def test_a_long_integer_keeps_its_last_digit(write: Callable[..., Path]) -> None:
    assert only_stage(load_recipe(write({"max_steps": 2**63 - 1}))).max_steps == 2**63 - 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("false", False), ("yes", True), ("no", False), ("on", True), ("'false'", False), ("0", False)],
)
def test_booleans(write: Callable[..., Path], text: str, expected: bool) -> None:
    arguments = only_stage(load_recipe(write(f"matryoshka: {text}\nmask_duplicates: {text}\n")))
    assert (arguments.matryoshka, arguments.mask_duplicates) == (expected, expected)


def test_lists(write: Callable[..., Path]) -> None:
    told = {"sources": ["web_*", "sts"], "task_types": ["retrieval"], "matryoshka_dimensions": [64, 32]}
    arguments = only_stage(load_recipe(write(told)))
    assert {key: getattr(arguments, key) for key in told} == told


def test_single_value_is_a_list_of_one(write: Callable[..., Path]) -> None:
    arguments = only_stage(load_recipe(write({"sources": "web_*", "matryoshka_dimensions": 64})))
    assert (arguments.sources, arguments.matryoshka_dimensions) == (["web_*"], [64])


def test_mapping_arrives_whole(write: Callable[..., Path]) -> None:
    config = {
        "hidden_size": 64,
        "rms_norm_eps": 0.5,
        "layer_types": None,
        "family": "größer",
        "tie_word_embeddings": True,
    }
    arguments = only_stage(load_recipe(write({"output_dir": "x", "model_config": config}, base={})))
    assert arguments.model_config_fields() == config


@pytest.mark.parametrize(
    "text",
    ['Größe "東京": a=b, {x}\nsecond line', "--looks like a key", "-dash", "--dash", "--seed", ""],
)
def test_text_arrives_as_written(write: Callable[..., Path], text: str) -> None:
    assert only_stage(load_recipe(write({"query_instruction": text}))).query_instruction == text
    overrides = command_line_overrides([f"--query_instruction={text}"])
    assert only_stage(load_recipe(write({}), overrides)).query_instruction == text


def test_null_means_the_default(write: Callable[..., Path]) -> None:
    arguments = only_stage(load_recipe(write({"cap": None, "seed": None, "matryoshka": None})))
    assert (arguments.cap, arguments.seed, arguments.matryoshka) == (None, 42, True)


# Overrides


def test_overrides_replace_keys(write: Callable[..., Path]) -> None:
    overrides = command_line_overrides(
        ["--seed", "9", "--learning_rate=1e-5", "--sources", "a", "b", "--matryoshka=no"]
    )
    arguments = only_stage(load_recipe(write({"seed": 1, "sources": ["x"]}), overrides))
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
    assert only_stage(load_recipe(write({}), {"output_dir": "other"})).output_dir == "other"


def test_override_may_give_the_output_dir_that_the_recipe_lacks(write: Callable[..., Path]) -> None:
    for keys in ({"model": "m"}, {"model": "m", "stages": {"a": {}}}):
        assert only_stage(load_recipe(write(keys, base={}), {"output_dir": "x"})).output_dir.startswith("x")


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


@pytest.mark.parametrize("key", ["query_instruction", "model", "learning_rate", "report_to"])
def test_a_key_that_is_no_truth_value_needs_one(refuses: Refuses, key: str) -> None:
    with refuses(f"--{key} VALUE"):
        command_line_overrides(["--compile", f"--{key}", "--seed", "1"])


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


@pytest.mark.parametrize(
    "keys", [{"model": "m"}, {"model": "m", "stages": {"a": {}}}, {**ONE_STAGE, "output_dir": None}]
)
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
        ("cap", "1.5e0", "'1.5'"),
        ("seed", 2**70, "64 bits"),
        ("num_train_epochs", float("nan"), "finite number"),
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
    arguments = only_stage(load_recipe(write({"source_caps": {"web_*": 5}})))
    assert (arguments.cap_of("web_kor"), arguments.cap_of("sts")) == (5, None)
    path = write("source_caps: {sts: 7, web_*: 1e-4}\n")
    with refuses(path, "stage 'recipe'", "'source_caps'", "'web_*'", "0.0001"):
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


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "learning_rate"),
        ("LR", "learning_rate"),
        ("batch_size", "global_batch_size"),
        ("epochs", "num_train_epochs"),
        ("num_hard_negatives", "num_hard_negatives_retrieval"),
        ("learning_rat", "learning_rate"),
        ("max_lengths", "max_length"),
    ],
)
def test_unknown_key_names_the_one_that_is_meant(
    write: Callable[..., Path], refuses: Refuses, key: str, meant: str
) -> None:
    with refuses("command line", repr(key), f"did you mean {meant!r}?"):
        command_line_overrides([f"--{key}", "1"])
    path = write({key: 1})
    with refuses(path, repr(key), f"did you mean {meant!r}?"):
        load_recipe(path)


@pytest.mark.parametrize(("key", "near"), [("sed", "seed"), ("see", "seed"), ("lq", None), ("xr", None)])
def test_a_short_word_that_is_near_by_chance_is_not_suggested(refuses: Refuses, key: str, near: str | None) -> None:
    with refuses(repr(key), "--help lists the known ones" if near is None else f"did you mean {near!r}?"):
        command_line_overrides([f"--{key}", "1"])


def test_all_meanings_are_keys() -> None:
    assert set(recipe._MEANT.values()) <= set(recipe._STAGE_KEYS) and not set(recipe._MEANT) & set(recipe._STAGE_KEYS)
