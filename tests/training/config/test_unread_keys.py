"""Keys that other keys make useless are said, where a recipe may give them to all of its stages; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.training.recipes import recipe_writer, write_single_stage
from tests.training.stages.test_continuation import error_of
from training.config.arguments import StageArguments
from training.config.recipe import load_recipe
from training.config.unread_keys import unread_keys
from training.run_stage import main

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def unread(tmp_path: Path) -> Callable[..., list[str]]:
    write = recipe_writer(tmp_path)

    def unread(**keys: Any) -> list[str]:
        (only,) = load_recipe(write(keys)).stages
        return list(unread_keys(only))

    return unread


@pytest.mark.parametrize(
    ("keys", "beside", "line"),
    [
        ({"eval_steps": 5}, {"eval_strategy": "steps"}, "eval_strategy: steps"),
        ({"save_steps": 5, "save_strategy": "epoch"}, {"save_strategy": "steps"}, "save_strategy: steps"),
        ({"logging_steps": 5, "logging_strategy": "epoch"}, {"logging_strategy": "steps"}, "logging_strategy: steps"),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant_with_warmup"},
         "lr_scheduler_type: constant_with_warmup"),
        ({"adam_beta1": 0.8, "optim": "sgd"}, {"optim": "adamw_torch"}, "optim: adamw_torch"),
        ({"metric_for_best_model": "loss", "eval_strategy": "steps", "save_strategy": "steps"},
         {"load_best_model_at_end": True}, "load_best_model_at_end: true"),
        ({"distillation_weight": 0.5}, {"teacher": "some/teacher"}, "teacher: MODEL"),
        ({"document_instruction_share": 0.5, "instructions": False}, {"instructions": True}, "instructions: true"),
        ({"matryoshka_min_dim": 8, "matryoshka": False}, {"matryoshka": True}, "matryoshka: true"),
        ({"matryoshka_min_dim": 8, "matryoshka_dimensions": [16]}, {"matryoshka_dimensions": None},
         "matryoshka_dimensions: null"),
        ({"num_train_epochs": 3, "max_steps": 5}, {"max_steps": -1}, "max_steps: -1"),
        ({"calibration_texts": 5}, {"prune_to": {"num_hidden_layers": 1}}, "prune_to: SHAPE"),
        ({"optim_target_modules": "all-linear"}, {"optim": "apollo_adamw"}, "optim: apollo_adamw"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, {"gradient_checkpointing": True},
         "activation_checkpointing: true"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_said_with_the_line_to_write(
    unread: Callable[..., list[str]], keys: dict[str, Any], beside: dict[str, Any], line: str
) -> None:
    (said,) = unread(**keys)
    assert f"key {next(iter(keys))!r} has no effect without '{line}'" in said
    assert unread(**{**keys, **beside}) == []


def test_it_is_said_when_the_stage_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = write_single_stage(tmp_path, eval_strategy=False, eval_steps=3, max_steps=1)
    assert main([str(recipe)]) == 0
    assert "stage 'single': key 'eval_steps' has no effect without 'eval_strategy: steps'" in caplog.text


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"dataloader_persistent_workers": True}, "'dataloader_num_workers: 2'"),
        ({"optim_args": "a=1"}, "'optim: adamw_torch_fused'"),
        ({"fsdp_config": {"a": 1}}, "'fsdp: true'"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "'eval_strategy: epoch'"),
        ({"activation_checkpointing_kwargs": "abc"}, "'activation_checkpointing_kwargs' is not valid JSON"),
        ({"activation_checkpointing_kwargs": {"use_reentrent": True}}, "did you mean 'use_reentrant'?"),
        ({"lr_scheduler_kwargs": "abc"}, "'lr_scheduler_kwargs' is not valid JSON"),
    ],
)
def test_what_can_do_nothing_in_any_stage_is_refused(refuses: Refuses, keys: dict[str, Any], told: str) -> None:
    with refuses(next(iter(keys)), told):
        StageArguments(**{"output_dir": "runs/x", "use_cpu": True, "model": "some/model", **keys})


def test_a_configuration_that_is_not_there(tmp_path: Path, refuses: Refuses) -> None:
    with refuses("stage 'recipe'", "/nowhere.json"):
        load_recipe(recipe_writer(tmp_path)({"fsdp": "full_shard", "fsdp_config": "/nowhere.json"}))


def test_a_schedule_that_cannot_be_computed_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    keys = {"lr_scheduler_type": "polynomial", "max_steps": 2, "warmup_steps": 2}
    error = error_of([str(write_single_stage(tmp_path, **keys))], capsys)
    assert "a schedule of 2 steps" in error and "'warmup_steps: 2'" in error
    assert main([str(write_single_stage(tmp_path, **keys)), "--warmup_steps", "1"]) == 0
