"""Every key of a stage works, or is refused with what to give instead; none changes nothing without a word."""

from __future__ import annotations

import logging
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from tests.training.recipes import recipe_writer
from training.config.arguments import StageArguments
from training.config.recipe import command_line_overrides, load_recipe
from training.config.stage_keys import LEARNT, MACHINE, PLACES, REFUSED, RUNNING, check_given

ROLES = {"learnt": LEARNT, "running": RUNNING, "places": PLACES, "machine": MACHINE, "refused": frozenset(REFUSED)}


@pytest.fixture
def write(tmp_path):
    return recipe_writer(tmp_path)


def test_every_key_has_one_role():
    roles = {key: [name for name, of in ROLES.items() if key in of] for key in frozenset().union(*ROLES.values())}
    # A new key: try what it does in this trainer, and whether a card may list it.
    assert {each.name for each in fields(StageArguments)} - roles.keys() == set()
    assert {key: of for key, of in roles.items() if len(of) > 1} == {}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_key_without_effect_is_refused_whatever_its_value(write, refuses, key):
    default = {each.name: each for each in fields(TrainingArguments)}[key].default
    # Even the default: whoever writes it takes it for what happens.
    for value in (default if isinstance(default, str | int | float) else "x", False, 3):
        with refuses("stage 'recipe'", repr(key), "no effect", REFUSED[key]):
            load_recipe(write({key: value}))
    with refuses(repr(key), REFUSED[key]):
        load_recipe(write({}), command_line_overrides([f"--{key}=x"]))
    # Nothing was given.
    load_recipe(write({key: None}))


def test_key_of_another_version_of_transformers(caplog):
    with caplog.at_level(logging.WARNING):
        check_given({"learning_rate": 1e-3, "brand_new": 1})
    assert "'brand_new'" in caplog.text and "learning_rate" not in caplog.text


SECRET = "hf_" + "aB3" * 12


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hub_token", SECRET),
        ("executor", {"name": "slurm", "env_command": f"export HF_TOKEN={SECRET}"}),
        ("executor", {"name": "slurm", "sbatch_args": {"api_key": "0123"}}),
        ("executor", '{"name": "slurm", "password": "0123"}'),
        ("builder_options", {"locale_dirs": [f"https://user:{SECRET}@host/x"]}),
        ("data_dir", "https://alice:0123@host/data"),
        ("run_name", f"try with {SECRET}"),
    ],
)
def test_no_secret_gets_into_the_folder_of_a_run(write, refuses, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        load_recipe(write({key: value}))
    message = str(caught.value)
    assert "HF_TOKEN" in message and len(message.splitlines()) == 1
    assert SECRET not in message and "0123" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("executor", {"name": "slurm", "time": "01:00:00", "partition": "cpu"}),
        ("data_dir", "hf://datasets/org/name"),
        ("data_dir", "https://host:8080/data@v1"),
        ("model_config", {"pad_token_id": 0, "eos_token_id": 1}),
    ],
)
def test_what_only_looks_like_a_secret(key, value):
    check_given({key: value})
