"""Finished runs to be packed: four tiny stages, of which one is cut and one taught, as the quickstart has them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from modeling_f2llm import F2LLMConfig
from modeling_f2llm.prompts import DEFAULT_PROMPTS
from tests.training.distributed_recipe import save_model
from tests.training.publishing.broken import BrokenRelease
from tests.training.publishing.packed import BASE, train_adapter
from tests.training.recipes import write_recipe
from training.publishing.pack import PackOptions, pack
from training.run_stage import main

PRUNED = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Spares the drawing, which takes most of the time, where nothing depends on it."""
    monkeypatch.setattr("training.publishing.pack.draw_figures", lambda folder: [])


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the four stages, trained once from relative paths; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("publishing")
    recipe = write_recipe(folder)
    content = yaml.safe_load(recipe.read_text().replace(f"{folder}/", ""))
    stages = content["stages"]
    stages["pruned"] = {"model": "stage1", "instructions": False, "task_types": ["retrieval"], "prune_to": PRUNED}
    stages["student"] = {**stages["stage2"], "model": "pruned", "teacher": "stage2", "prepared_dir": "stage2"}
    recipe.write_text(yaml.safe_dump({**content, "num_train_epochs": 1, "save_strategy": "epoch"}, sort_keys=False))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main([recipe.name]) == 0
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.fixture
def runs(trained_runs: Path, tmp_path: Path) -> Path:
    """A copy of the output folder, elsewhere than it was trained, with the data beside it."""
    shutil.copytree(trained_runs.parent / "data", tmp_path / "data")
    shutil.copytree(trained_runs, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def instructed(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished stage whose model has a prompt for queries."""
    run = tmp_path_factory.mktemp("instructed") / "run"
    shutil.copytree(uninterrupted, run)
    path = run / "model/config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": DEFAULT_PROMPTS}))
    return run


@pytest.fixture(scope="session")
def release(instructed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed stage, packed once; to be copied, not changed."""
    return pack(instructed, tmp_path_factory.mktemp("packed") / "tiny", PackOptions("tiny"))


@pytest.fixture
def broken(release: Path, tmp_path: Path) -> BrokenRelease:
    """A copy of the packed stage, to be broken."""
    return BrokenRelease(release, tmp_path / "tiny")


@pytest.fixture(scope="session")
def adapter_base(tmp_path_factory: pytest.TempPathFactory, tiny_config: F2LLMConfig, tiny_tokenizer) -> Path:
    """The model that the adapter adapts; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("adapter-base") / "model"
    save_model(folder, tiny_config, tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def trained_adapter(adapter_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an adapter; to be copied, not changed."""
    return train_adapter(tmp_path_factory.mktemp("adapter"), adapter_base)


@pytest.fixture
def adapter_run(trained_adapter: Path, tmp_path: Path, hub_cache: Path) -> Path:
    """A copy of the adapter's run, where the Hub's cache is empty."""
    return Path(shutil.copytree(trained_adapter, tmp_path / "adapter"))


@pytest.fixture(scope="session")
def adapter_release(trained_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed adapter, packed once; to be copied, not changed."""
    return pack(
        trained_adapter,
        tmp_path_factory.mktemp("packed") / "tiny",
        PackOptions("tiny", licence="apache-2.0", base=BASE),
    )


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    return tmp_path / "hub-cache"


@pytest.fixture
def broken_adapter(adapter_release: Path, tmp_path: Path, hub_cache: Path) -> BrokenRelease:
    """A copy of the packed adapter, to be broken."""
    return BrokenRelease(adapter_release, tmp_path / "tiny")
