"""Finished runs to be packed: four tiny stages, of which one is cut and one taught, as the quickstart has them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from modeling_f2llm.prompts import DEFAULT_PROMPTS
from tests.training.distributed_recipe import save_model
from tests.training.publishing.packed import BASE, BrokenRelease, rewrite_json, train_adapter
from tests.training.recipes import write_recipe
from training.publishing.pack import PackOptions, pack
from training.run_stage import main

PRUNED = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}

# What fixtures of a session make is to be copied, not changed.


@pytest.fixture
def no_figures(monkeypatch):
    """Spares the drawing, which takes most of the time, where nothing depends on it."""
    monkeypatch.setattr("training.publishing.pack.draw_figures", lambda folder: [])


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    """The output folder of the four stages, trained from relative paths."""
    folder = tmp_path_factory.mktemp("publishing")
    recipe = write_recipe(folder)
    content = yaml.safe_load(recipe.read_text().replace(f"{folder}/", ""))
    stages = content["stages"]
    stages["pruned"] = {"model": "stage1", "instructions": False, "task_types": ["retrieval"], "prune_to": PRUNED}
    stages["student"] = {**stages["stage2"], "model": "pruned", "teacher": "stage2", "prepared_dir": "stage2"}
    recipe.write_text(yaml.safe_dump({**content, "num_train_epochs": 1, "save_strategy": "epoch"}, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([recipe.name]) == 0
    return folder / "run"


@pytest.fixture
def runs(trained_runs, tmp_path):
    """A copy of the output folder, elsewhere than it was trained, with the data beside it."""
    shutil.copytree(trained_runs.parent / "data", tmp_path / "data")
    shutil.copytree(trained_runs, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def instructed(uninterrupted, tmp_path_factory):
    run = tmp_path_factory.mktemp("instructed") / "run"
    shutil.copytree(uninterrupted, run)
    rewrite_json(run / "model/config_sentence_transformers.json", prompts=DEFAULT_PROMPTS)
    return run


@pytest.fixture(scope="session")
def release(instructed, tmp_path_factory):
    return pack(instructed, tmp_path_factory.mktemp("packed") / "tiny", PackOptions("tiny"))


@pytest.fixture
def broken(release, tmp_path):
    return BrokenRelease(release, tmp_path / "tiny")


@pytest.fixture(scope="session")
def adapter_base(tmp_path_factory, tiny_config, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("adapter-base") / "model"
    save_model(folder, tiny_config, tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def trained_adapter(adapter_base, tmp_path_factory):
    return train_adapter(tmp_path_factory.mktemp("adapter"), adapter_base)


@pytest.fixture
def adapter_run(trained_adapter, tmp_path, hub_cache):
    return Path(shutil.copytree(trained_adapter, tmp_path / "adapter"))


@pytest.fixture(scope="session")
def adapter_release(trained_adapter, tmp_path_factory):
    options = PackOptions("tiny", licence="apache-2.0", base=BASE)
    return pack(trained_adapter, tmp_path_factory.mktemp("packed") / "tiny", options)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    return tmp_path / "hub-cache"


@pytest.fixture
def broken_adapter(adapter_release, tmp_path, hub_cache):
    return BrokenRelease(adapter_release, tmp_path / "tiny")
