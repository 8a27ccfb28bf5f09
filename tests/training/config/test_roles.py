"""Keys of transformers without effect are refused with what to give instead; no value of a key may hold a secret."""

from __future__ import annotations

import pytest

from tests.training.recipes import recipe_writer
from training.config.arguments import LEARNT, MACHINE, PATHS, REFUSED, RUNNING, check_given
from training.config.recipe import command_line_overrides, load_recipe

SECRET = "hf_" + "aB3" * 12


@pytest.fixture
def write(tmp_path):
    return recipe_writer(tmp_path)


def test_every_key_has_one_role():
    roles = [LEARNT, RUNNING, PATHS, MACHINE, {*REFUSED}]
    assert sum(map(len, roles)) == len(set().union(*roles))
    assert {"learning_rate", "temperature"} <= LEARNT and "output_dir" in MACHINE and "model" in PATHS


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_key_without_effect_is_refused_whatever_its_value(write, refuses, key):
    for value in ("x", False, 3):
        with refuses("stage 'recipe'", repr(key), "no effect", REFUSED[key]):
            load_recipe(write({key: value}))
    with refuses(repr(key), REFUSED[key]):
        load_recipe(write({}), command_line_overrides([f"--{key}=x"]))
    # Nothing was given.
    load_recipe(write({key: None}))


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


def test_what_only_looks_like_a_secret():
    check_given({"executor": {"name": "slurm", "time": "01:00:00", "partition": "cpu"}})
    check_given({"data_dir": "hf://datasets/org/name", "model_config": {"pad_token_id": 0, "eos_token_id": 1}})
    check_given({"data_dir": "https://host:8080/data@v1", "run_name": "hf_experiment"})
