"""Recipes and command lines: how values are read, what replaces what, and what is refused."""

from __future__ import annotations

import warnings

import pytest

from tests.training.recipes import ONE_STAGE, only_stage, recipe_writer
from training.config.recipe import command_line_overrides, load_recipe


@pytest.fixture
def write(tmp_path):
    return recipe_writer(tmp_path)


@pytest.fixture
def read(write):
    """The arguments of a recipe of some keys or YAML text, and of words of the command line."""
    return lambda keys="", *words: only_stage(load_recipe(write(keys), command_line_overrides(words)))


def test_recipe_without_stages_is_one_stage(write):
    (stage,) = load_recipe(str(write({"seed": 3}, "small.yaml"))).stages
    assert stage.name == "small" and stage.keys == {**ONE_STAGE, "seed": 3}
    assert (stage.arguments.output_dir, stage.arguments.model, stage.arguments.seed) == ("runs/x", "some/model", 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((f"learning_rate: {text}", 1e-5) for text in ("1e-5", "1.0e-5", "1E-5", "0.00001", "'1e-5'")),
        *((f"max_steps: {text}", 1000) for text in ("1000", "'1000'", "1_000", "1e3", "1.0e3")),
        *((f"mask_duplicates: {text}", True) for text in ("true", "yes", "on")),
        *((f"matryoshka: {text}", False) for text in ("false", "no", "'false'", "0")),
        *((f"{kind}_strategy: {text}", "no") for kind in ("eval", "save", "logging") for text in ("no", "off", "'no'")),
        *((f"include_num_input_tokens_seen: {text}", "all") for text in ("non_padding", "true")),
        *((f"include_num_input_tokens_seen: {text}", "no") for text in ("no", "'no'")),
        *(("max_steps: -1", -1), ("max_steps: 9223372036854775807", 2**63 - 1), ("ddp_timeout: 7.2e3", 7200)),
        *(("cap: null", None), ("seed: null", 42), ("warmup_steps: 0.1", 0.1), ("tf32: false", False)),
        *(("matryoshka_dimensions: [6.4e1, 32]", [64, 32]), ("matryoshka_dimensions: 64", [64])),
        *(("sources: web_*", ["web_*"]), ("fsdp: true", True), ("fsdp: false", False)),
        *(("report_to: tensorboard", ["tensorboard"]), ("report_to: []", []), ("report_to: [none]", [])),
        ("optim_target_modules: [attn, mlp]", ["attn", "mlp"]),
        ("optim_target_modules: all-linear", "all-linear"),
        ("lr_scheduler_kwargs: {min_lr: 1e-5}", {"min_lr": 1e-5}),
        ("liger_kernel_config: {rope: false}", {"rope": False, "fused_linear_cross_entropy": False}),
        ("activation_checkpointing_kwargs: {use_reentrant: false}", {"use_reentrant": False}),
    ],
)
def test_values_of_several_types(read, text, expected):
    key, value = text.split(": ", 1)
    found = getattr(read(f"{text}\n"), key)
    assert isinstance(found, type(expected)) and found == expected
    value = value.strip("'")
    if value[0] not in "[{" and value not in ("null", "on", "off"):
        assert getattr(read("", f"--{key}={value}"), key) == expected


def test_mapping_arrives_whole(write):
    config = {"hidden_size": 64, "rms_norm_eps": 0.5, "layer_types": None, "family": "größer", "use_cache": True}
    path = write({"output_dir": "x", "model_config": config}, base={})
    assert only_stage(load_recipe(path)).mapping("model_config") == config


@pytest.mark.parametrize(
    "text", ['Größe "東京": a=b, {x}\nsecond line', "--looks like a key", "-dash", "--dash", "--seed", ""]
)
def test_text_arrives_as_written(read, text):
    assert read({"query_instruction": text}).query_instruction == text
    assert read("", f"--query_instruction={text}").query_instruction == text


@pytest.mark.parametrize("key", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_by_its_newer_and_its_older_name(read, key):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = read(f"{key}: true\n{key}_kwargs: {{use_reentrant: false}}\n")
        assert not read().activation_checkpointing and not read().gradient_checkpointing
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert getattr(arguments, name) is True
        assert getattr(arguments, f"{name}_kwargs") == {"use_reentrant": False}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--max-length 9", {"max_length": "9"}),
        ("--max_steps -1 --fsdp", {"max_steps": "-1", "fsdp": True}),
        ("--bf16 --seed 9", {"bf16": True, "seed": "9"}),
        ("--sources a b --seed=9", {"sources": ["a", "b"], "seed": "9"}),
        ("--query_instruction=a=b --bf16 false", {"query_instruction": "a=b", "bf16": "false"}),
        ("--query_instruction= --seed 1 --seed 2", {"query_instruction": "", "seed": "2"}),
    ],
)
def test_command_line(words, expected):
    assert command_line_overrides(words.split()) == expected


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        *((f"--compile --{key} --seed 1", [f"--{key} VALUE"]) for key in ("model", "learning_rate", "report_to")),
        ("--learning-rat 1", ["command line", "'learning_rat'", "did you mean 'learning_rate'?"]),
        ("recipe2.yaml", ["command line", "'recipe2.yaml'"]),
    ],
)
def test_bad_command_line(refuses, words, parts):
    with refuses(*parts):
        command_line_overrides(words.split())


def test_overrides_replace_keys_of_every_stage_and_move_all(write, read):
    arguments = read({"seed": 1, "sources": ["x"]}, "--seed", "9", "--sources", "a", "b")
    assert (arguments.seed, arguments.sources) == (9, ["a", "b"])
    stages = {"a": {"seed": 2, "cap": 3}, "b": {"model": "a"}, "c": {"model": "b", "output_dir": "elsewhere"}}
    loaded = load_recipe(write({"seed": 1, "stages": stages}), {"seed": "9", "cap": "4", "output_dir": "other"})
    found = [(of.seed, of.cap, of.output_dir, of.model) for of in (stage.arguments for stage in loaded.stages)]
    places = [("other/a", "some/model"), ("other/b", "other/a/model"), ("elsewhere", "other/b/model")]
    assert found == [(9, 4, *place) for place in places]
    # The recipe itself may lack it.
    for keys in ({"model": "m"}, {"model": "m", "stages": {"a": {}}}):
        assert only_stage(load_recipe(write(keys, base={}), {"output_dir": "x"})).output_dir.startswith("x")


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ("stages: [\n", ["not valid YAML"]),
        ("stages:\n  a: {seed: 1}\n  a: {seed: 2}\n", ["'a'", "twice"]),
        ({"learning_rat": 1}, ["unknown key", "did you mean 'learning_rate'?"]),
        ({"stages": {"a": {"tokeniser": "train"}}}, ["unknown key", "did you mean 'tokenizer'?"]),
        ({"stage": {}}, ["unknown key", "did you mean 'stages'?"]),
        ({1: 1}, ["unknown key", "--help lists"]),
        ({"output_dir": None}, ["'output_dir'", "missing"]),
        ({"output_dir": None, "stages": {"a": {}}}, ["'output_dir'", "missing"]),
        ({"stages": {"first": {}, "second": {"temperature": 0}}}, ["stage 'second'", "'temperature'"]),
        ({"stages": {"a": {"stages": {"b": {}}}}}, ["unknown key 'stages'"]),
        *(({"stages": stages}, ["'stages'"]) for stages in (["a", "b"], "a", {"a": None}, {})),
        *(({"stages": {name: {"seed": 1}}}, [f"stage {name!r}", "folder"]) for name in (1, None, "a/b", "..", "")),
        ({"stages": {"a": {"model": "a"}}}, ["stage 'a'", "'a', named as model", "has not run"]),
        ({"stages": {"a": {"model": "b"}, "b": {}}}, ["stage 'a'", "'b', named as model", "has not run"]),
        *(
            ({**keys, key: ["b"]} if keys is not None else {"stages": {"a": {key: ["b"]}}}, [repr(key), "['b']"])
            for key in ("model", "output_dir")
            for keys in ({}, {"stages": {"a": {}}}, None)
        ),
    ],
)
def test_faulty_recipe(write, refuses, keys, parts):
    path = write(keys) if isinstance(keys, str) else write({**ONE_STAGE, **keys}, base={})
    with refuses(path, *parts):
        load_recipe(path)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("learning_rate", "fast", "'fast'"),
        ("learning_rate", [0.1, 0.2], "0.2"),
        ("global_batch_size", 2.5, "'2.5'"),
        ("seed", 2**70, "at most"),
        ("seed", True, "'true'"),
        ("matryoshka", "maybe", "maybe"),
        ("matryoshka_dimensions", [64, "x"], "'x'"),
        ("lora_target_modules", [], "at least one"),
        ("eval_strategy", "sometimes", "'sometimes'"),
        ("include_num_input_tokens_seen", "some", "some"),
        ("fsdp_config", "/nowhere.json", "/nowhere.json"),
    ],
)
def test_wrong_value(write, refuses, key, value, shown):
    path = write({"stages": {"first": {key: value, **({"fsdp": True} if key == "fsdp_config" else {})}}})
    with refuses(path, "stage 'first'", key, shown):
        load_recipe(path)
