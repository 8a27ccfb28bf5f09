from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from training.models.merging.parents import find_parent


def test_runs_and_their_checkpoints_are_found(save_model, tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    (run / "recipe.yaml").touch()
    model = save_model("model")
    for name in ("model", "checkpoint-5", "checkpoint-10"):
        shutil.copytree(model, run / name)
    assert (find_parent(str(run)).folder, find_parent(str(run)).name) == (run / "model", "mine/model")
    assert find_parent(str(run / "checkpoint-5")).name == "mine/checkpoint-5"
    # A folder that is no run's is told without the one around it, which may be anybody's.
    assert find_parent(str(model)).name == "model"


def test_a_revision_on_the_hub_is_found_in_the_cache(save_model, tmp_path, monkeypatch, refuses):
    commit = "a" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "step-7").write_text(commit)
    shutil.copytree(save_model("model"), repository / "snapshots" / commit)
    parent = find_parent("some/model@step-7")
    assert (parent.name, parent.revision) == ("some/model", commit)
    assert parent.record() == {"name": "some/model", "revision": commit}
    with refuses("some/model@step-8", "not to be had from the Hub"):
        find_parent("some/model@step-8")


@pytest.mark.parametrize("word", ["no/such/folder", "./nothing", "nothing here", "a@b@c"])
def test_what_is_neither_folder_nor_name_is_refused(refuses, word):
    with refuses(word):
        find_parent(word)


def test_a_folder_without_a_model_is_refused(refuses, tmp_path: Path):
    with refuses(tmp_path, "holds no model"):
        find_parent(str(tmp_path))


@pytest.mark.parametrize("place", ["", "model"])
def test_an_adapter_is_to_be_merged_first(refuses, tmp_path: Path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "adapter_config.json").write_text("{}")
    with refuses(tmp_path, "an adapter", "merge it into its base first (merge_adapter.py)"):
        find_parent(str(tmp_path))


def test_pickled_weights_are_refused(refuses, save_model):
    model = save_model("model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with refuses(model, "pickled"):
        find_parent(str(model))
