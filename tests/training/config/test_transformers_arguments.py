"""Values that transformers documents, from a recipe and from the command line."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import TrainingArguments

from tests.training.recipes import only_stage, recipe_writer
from training.config.arguments import StageArguments
from training.config.recipe import command_line_overrides, load_recipe
from training.config.stage_keys import REFUSED

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path)


@pytest.fixture
def read(write: Callable[..., Path]) -> Callable[..., StageArguments]:
    """The arguments of a recipe of some YAML text, and of words of the command line."""

    def read(text: str = "", *words: str) -> StageArguments:
        return only_stage(load_recipe(write(text + "\n"), command_line_overrides(words)))

    return read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("[tensorboard]", ["tensorboard"]),
        ("tensorboard", ["tensorboard"]),
        ("[]", []),
        ("none", []),
        ("'none'", []),
        ("[none]", []),
    ],
)
def test_trackers(read: Callable[..., StageArguments], text: str, expected: list[str]) -> None:
    assert read(f"report_to: {text}").report_to == expected


@pytest.mark.parametrize("text", ["true", "false", "full_shard"])
def test_fsdp(read: Callable[..., StageArguments], text: str) -> None:
    assert read(f"fsdp: {text}").fsdp is read("", "--fsdp", text).fsdp is (text != "false")
    assert read("", "--fsdp").fsdp is True


def test_trackers_on_the_command_line(read: Callable[..., StageArguments]) -> None:
    assert read("", "--report_to", "tensorboard", "wandb").report_to == ["tensorboard", "wandb"]
    assert read("report_to: [wandb]", "--report_to", "none").report_to == []
    assert "tensorboard" in read("report_to: all").report_to
    assert read("", "--report_to=all").report_to == read("report_to: all").report_to


@pytest.mark.parametrize("written", ["no", "off", "false", "'no'"])
def test_no_as_yaml_reads_it(read: Callable[..., StageArguments], written: str) -> None:
    keys = ("eval_strategy", "save_strategy", "logging_strategy")
    arguments = read("\n".join(f"{key}: {written}" for key in keys))
    assert [getattr(arguments, key).value for key in keys] == ["no"] * 3


@pytest.mark.parametrize(
    ("written", "expected"),
    [("non_padding", "all"), ("all", "all"), ("true", "all"), ("no", "no"), ("false", "no"), ("'no'", "no")],
)
def test_counting_tokens(read: Callable[..., StageArguments], written: str, expected: str) -> None:
    assert read(f"include_num_input_tokens_seen: {written}").include_num_input_tokens_seen == expected
    word = f"--include_num_input_tokens_seen={written}".replace("'", "")
    assert read("", word).include_num_input_tokens_seen == expected


def test_counting_tokens_otherwise(read: Callable[..., StageArguments], refuses: Refuses) -> None:
    with refuses("'include_num_input_tokens_seen'", "'some'", "'non_padding'"):
        read("include_num_input_tokens_seen: some")


def _choices() -> list[tuple[str, str]]:
    """Every value of every key of transformers that has a list of them."""
    found = []
    for key, hint in get_type_hints(TrainingArguments).items():
        kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Enum)]
        found += [(key, each.value) for kind in kinds for each in kind if key not in REFUSED]
    return found


@pytest.mark.parametrize(("key", "value"), _choices())
def test_every_choice_is_read(write: Callable[..., Path], key: str, value: str) -> None:
    # Some need another key beside.
    beside = {"metric_for_best_model": "loss", "eval_strategy": "epoch"} if key != "eval_strategy" else {}
    path = write({**beside, key: value})
    for recipe in (load_recipe(path), load_recipe(write(beside), {key: value})):
        read = getattr(only_stage(recipe), key)
        assert getattr(read, "value", read) == value


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("optim_target_modules: [attn, mlp]", "optim_target_modules", ["attn", "mlp"]),
        ("optim_target_modules: all-linear", "optim_target_modules", "all-linear"),
        ("trackio_static_space_id: false", "trackio_static_space_id", False),
        ("trackio_static_space_id: org/space", "trackio_static_space_id", "org/space"),
        ("lr_scheduler_kwargs: {min_lr: 1e-5}", "lr_scheduler_kwargs", {"min_lr": 1e-5}),
        ("liger_kernel_config: {rope: false}", "liger_kernel_config",
         {"rope": False, "fused_linear_cross_entropy": False}),
        ("activation_checkpointing_kwargs: {use_reentrant: false}", "activation_checkpointing_kwargs",
         {"use_reentrant": False}),
        ("warmup_steps: 0.1", "warmup_steps", 0.1),
        ("eval_steps: 1e2", "eval_steps", 100),
        ("tf32: false", "tf32", False),
        ("disable_tqdm: yes", "disable_tqdm", True),
        ("ddp_timeout: 7.2e3", "ddp_timeout", 7200),
    ],
)  # fmt: skip
def test_values_of_several_types(read: Callable[..., StageArguments], text: str, key: str, expected: Any) -> None:
    assert getattr(read(text), key) == expected


@pytest.mark.parametrize("key", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_by_its_newer_and_its_older_name(read: Callable[..., StageArguments], key: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = read(f"{key}: true\n{key}_kwargs: {{use_reentrant: false}}")
        assert not read().activation_checkpointing and not read().gradient_checkpointing
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert getattr(arguments, name) is True
        assert getattr(arguments, f"{name}_kwargs") == {"use_reentrant": False}


def test_kernels_of_a_loss_that_an_embedding_model_does_not_have(
    read: Callable[..., StageArguments], refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.config.arguments.is_liger_kernel_available", lambda: True)
    assert read("use_liger_kernel: true").liger_kernel_config == {"fused_linear_cross_entropy": False}
    with refuses("'liger_kernel_config'", "'fused_linear_cross_entropy'", "give false"):
        read("liger_kernel_config: {fused_linear_cross_entropy: true}")
    with refuses("'liger_kernel_config' is not valid JSON"):
        read("", "--liger_kernel_config", "{rope")
