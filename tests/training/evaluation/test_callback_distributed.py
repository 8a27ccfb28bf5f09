"""Many processes score pairs as one does, and decide alike which checkpoint is the best and when to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMConfig
from tests.training.distributed_recipe import save_model, write_distributed_recipe
from tests.training.evaluation.watched_recipe import WATCHED, history, write_pairs
from tests.training.processes import ROOT, accelerate, run_bounded, torchrun
from training.run_stage import main

# Until the first evaluation that is not the best. A process that went by its own numbers would stop elsewhere: only the
# first one computes scores.
DECIDING = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "pairs_ndcg_at_10",
    "early_stopping_patience": 1,
    "max_steps": 30,
}


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: F2LLMConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", tiny_config, tiny_tokenizer)
    return folder


def write(folder: Path, models: Path, **keys: Any) -> Path:
    files = {
        "evaluation_pairs": str(folder / "data/found.parquet"),
        "evaluation_candidates": str(folder / "data/candidates.parquet"),
    }
    recipe = write_distributed_recipe(folder, models, ["mixed"], **{**files, **WATCHED, **DECIDING, **keys})
    write_pairs(folder)
    return recipe


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    folder = tmp_path_factory.mktemp("single")
    assert main([str(write(folder, models))]) == 0
    return folder / "run/mixed"


def check(run: Path, single: Path) -> None:
    wanted, found = history(single), history(run)
    # Stopped early, but not at once.
    assert 2 < len(wanted) < 15
    assert list(found) == list(wanted)
    for step, metrics in found.items():
        assert len(metrics) == 6 and metrics == pytest.approx(wanted[step], abs=1e-4)
    state = json.loads((run / f"checkpoint-{max(found)}/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(run / f"checkpoint-{max(found) - 2}")
    best, final, expected = (
        load_file(folder / "model.safetensors")
        for folder in (Path(state["best_model_checkpoint"]), run / "model", single / "model")
    )
    assert all(torch.equal(final[name], weights) for name, weights in best.items())
    assert max((final[name] - weights).abs().max().item() for name, weights in expected.items()) <= 1e-4


def test_two_processes_decide_as_one(tmp_path: Path, single: Path, models: Path) -> None:
    ended = run_bounded(torchrun(2, ROOT / "training/run_stage.py", write(tmp_path, models)), seconds=120)
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert ended.stdout.count("early stopping at step") == 1
    check(tmp_path / "run/mixed", single)


@pytest.mark.slow
def test_sharded_processes_decide_as_one(tmp_path: Path, single: Path, models: Path) -> None:
    worker = ROOT / "tests/training/distributed_worker.py"
    command = accelerate(tmp_path, 2, worker, "sharded", write(tmp_path, models, use_cpu=False))
    ended = run_bounded(command, seconds=120)
    assert ended.returncode == 0, ended.stdout[-4000:]
    check(tmp_path / "run/mixed", single)
