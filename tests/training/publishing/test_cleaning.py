"""Nothing of the place, the machine, the user or the environment is told."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from training.common.run_folder import public_name
from training.config.arguments import StageArguments
from training.publishing.cleaning import (
    TOLD,
    WITHHELD,
    check_nothing_private,
    clean_arguments,
    clean_config,
    private_texts,
)
from training.publishing.states import ModelState


def test_every_key_of_a_stage_is_told_or_withheld():
    keys = {each.name for each in fields(StageArguments)}
    assert TOLD & WITHHELD == set()
    # A new key: decide whether it changes what is learnt, and names no place.
    assert keys - TOLD - WITHHELD == set()
    assert (TOLD | WITHHELD) - keys == set()


def test_keys_that_name_places_accounts_and_machines_are_withheld():
    assert not [key for key in TOLD if key.endswith(("_dir", "_token", "_id", "_path"))]
    assert WITHHELD >= {"output_dir", "manifest", "run_name", "report_to", "hub_token", "deepspeed", "fsdp_config"}


def test_arguments_are_told_by_key():
    told = clean_arguments(
        {
            "learning_rate": 1e-3,
            "output_dir": "/home/alice/x",
            "something_new": "/home/alice/y",
            "source_caps": '{"mono_*": 5}',
            "builder_options": {"locale_dirs": ["/usr/share/alice"], "most": 5, "share": 0.1, "none": None},
        }
    )
    assert told == {
        "learning_rate": 1e-3,
        "source_caps": {"mono_*": 5},
        "builder_options": {"most": 5, "share": 0.1, "none": None},
    }
    assert clean_arguments({"builder_options": json.dumps({"locale_dirs": ["/x"], "most": 5})}) == {
        "builder_options": {"most": 5}
    }


def test_configurations_do_not_tell_where_they_came_from():
    config = {"hidden_size": 8, "_name_or_path": "/home/alice/x", "name_or_path": "y", "tokenizer_file": "z"}
    assert clean_config(config) == {"hidden_size": 8}


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/someone/models/big", "big"),
        ("big", "big"),
        ("runs/alice-best", ""),
        ("runs/Alice_7", ""),
        ("runs/alicetta", "alicetta"),
        ("/data/gpu07", ""),
        ("/data/gpu07.cluster", ""),
    ],
)
def test_a_place_is_told_by_its_last_part_unless_that_names_user_or_machine(place, name, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr("platform.node", lambda: "gpu07.cluster")
    assert public_name(place) == name


def test_a_container_without_users_can_still_pack(monkeypatch):
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert public_name("runs/model") == "model"


def test_what_is_private_follows_from_recipe_home_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice-home")
    monkeypatch.setenv("SOME_API_KEY", "key-of-alice")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("training.publishing.cleaning.get_token", lambda: "hf_ofalice")
    keys = {
        "output_dir": "runs/alice/x",
        "executor": '{"name": "slurm", "logging_dir": "/scratch/logs"}',
        "builder_options": {"locale_dirs": ["/usr/share/catalogs"]},
        "model": "Qwen/Qwen3-0.6B",
        "learning_rate": 1e-3,
        "tokenizer": "train",
    }
    texts = private_texts([ModelState(tmp_path / "x", tmp_path / "x/model", keys)])
    assert texts.keys() >= {"/home/alice-home", "key-of-alice", "hf_ofalice", "runs/alice/x", "/scratch/logs"}
    assert texts.keys() >= {"/usr/share/catalogs", str(tmp_path / "x")}
    assert not texts.keys() & {"Qwen/Qwen3-0.6B", "false", "train", "slurm"}


@pytest.mark.parametrize("name", ["README.md", "evaluation/scores.json", "figures/a.svg", "examples.npz"])
def test_a_private_text_in_any_file_is_found_and_not_repeated(name, tmp_path, refuses):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x00" * 5000 + b"/secret/place" + b"\x00")
    with refuses(path.name, "the place"):
        check_nothing_private(tmp_path, {"/secret/place": "the place"})
    try:
        check_nothing_private(tmp_path, {"/secret/place": "the place"})
    except ValueError as error:
        assert "/secret/place" not in str(error)
    check_nothing_private(tmp_path, {"/another/place": "the place"})


@pytest.mark.parametrize("arrays", [{"/secret/place|0": [1.0]}, {"a": np.frombuffer(b"see /secret/place for it")}])
def test_a_private_text_is_found_in_compressed_arrays(arrays, tmp_path, refuses):
    np.savez_compressed(tmp_path / "examples.npz", **arrays)
    with refuses("examples.npz", "the place"):
        check_nothing_private(tmp_path, {"/secret/place": "the place"})


def test_a_private_text_is_found_as_json_writes_it(tmp_path, refuses):
    (tmp_path / "release.json").write_text(json.dumps({"a": "/home/josé/läufe"}))
    with refuses("release.json", "the place"):
        check_nothing_private(tmp_path, {"/home/josé/läufe": "the place"})


def test_a_vocabulary_may_hold_what_looks_like_a_place(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"/workspace": 7}')
    check_nothing_private(tmp_path, {"/workspace": "the working folder"})
