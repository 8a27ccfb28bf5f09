"""Finished runs to be packed: four tiny stages, of which one is cut and one taught, as the quickstart has them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.training.recipes import write_recipe
from training.run_stage import main

PRUNED = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


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
