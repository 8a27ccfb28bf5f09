from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.recipes import only_stage, recipe_writer
from training.config.lora_arguments import LORA_TARGETS
from training.config.recipe import load_recipe
from training.models.adapter import adapter_config


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"lora_rank": 0}, ("lora_rank", "at least 1", 0)),
        ({"lora_alpha": -2}, ("lora_alpha", "at least 1", -2)),
        ({"lora_dropout": 1.0}, ("lora_dropout", "between 0 and 1")),
        ({"lora_target_modules": []}, ("lora_target_modules", "at least one")),
        ({"prune_to": {"hidden_size": 16}}, ("prune_to", "lora")),
        ({"trim_vocabulary": True}, ("trim_vocabulary", "lora")),
        ({"model": None, "model_config": {"hidden_size": 32}}, ("lora", "give it as 'model'")),
        ({"compile": True, "lora_dropout": 0.1}, ("lora_dropout", "compile")),
        ({"compile": True, "lora_dora": True}, ("compile", "DoRA")),
    ],
)
def test_bad_values_are_errors_that_name_the_key(
    tmp_path: Path, refuses, keys: dict[str, Any], parts: tuple[object, ...]
) -> None:
    recipe = recipe_writer(tmp_path)({"output_dir": "runs/x", "model": "some/model", "lora": True, **keys}, base={})
    with refuses(*parts):
        load_recipe(recipe, {"use_cpu": True})


@pytest.mark.parametrize(
    "keys", [{"lora_rank": 8}, {"lora_dora": True}, {"lora_dropout": 0.1}, {"lora_target_modules": ["q_proj"]}]
)
def test_keys_of_an_adapter_without_one_are_refused(tmp_path: Path, refuses, keys: dict[str, Any]) -> None:
    with refuses(next(iter(keys)), "has no effect without 'lora: true'"):
        load_recipe(recipe_writer(tmp_path)(keys))


def test_what_is_left_out_is_usual(tmp_path: Path) -> None:
    config = adapter_config(only_stage(load_recipe(recipe_writer(tmp_path)({"lora": True}))))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (16, 32, 0.0, False)
    assert set(config.target_modules) == set(LORA_TARGETS)


def test_the_command_line_makes_it_an_adapter(tmp_path: Path) -> None:
    words = {"lora": True, "lora_rank": "8", "lora_target_modules": ["q_proj", "v_proj"], "lora_rslora": True}
    config = adapter_config(only_stage(load_recipe(recipe_writer(tmp_path)({}), words)))
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 16, True)
    assert set(config.target_modules) == {"q_proj", "v_proj"}


def test_no_adapter_without_the_key(tmp_path: Path) -> None:
    assert adapter_config(only_stage(load_recipe(recipe_writer(tmp_path)({})))) is None
