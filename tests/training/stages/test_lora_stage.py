"""A stage with ``lora: true``: the whole trainer, over an adapter."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from tests.training.distributed_recipe import save_model
from tests.training.recipes import NO_NEW_MODEL, error_of, rewind, write_single_stage
from training.common.run_folder import numbered_checkpoints, step_of
from training.models.adapters import ADAPTER_WEIGHTS
from training.models.model_ref import find_adapter
from training.run_stage import main


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_config, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, tiny_config, tiny_tokenizer)
    return folder


def write(folder, base, **keys):
    return write_single_stage(folder, **{"model": str(base), "lora": True, "lora_rank": 4, **NO_NEW_MODEL, **keys})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([str(write(folder, base))]) == 0
    return folder / "run"


def assert_same(*folders):
    torch.testing.assert_close(*(load_file(each / ADAPTER_WEIGHTS) for each in folders), rtol=0, atol=0)


def test_only_the_adapter_is_trained_and_saved(trained, base):
    for folder in (trained / "model", *trained.glob("checkpoint-*")):
        assert not list(folder.glob("model*.safetensors")) and not (folder / "config.json").exists()
        assert find_adapter(str(folder)).base == str(base)
        assert SentenceTransformer(str(folder)).encode("the red river").shape == (32,)
    weights = load_file(trained / "model" / ADAPTER_WEIGHTS)
    assert max(value.abs().max() for name, value in weights.items() if "lora_B" in name) > 1e-3
    state = torch.load(next(trained.glob("checkpoint-*")) / "optimizer.pt", weights_only=True)
    assert len(state["state"]) == len(weights)


@pytest.mark.parametrize(
    "keys",
    [
        {"max_tokens_per_forward": 100, "lora_dropout": 0.2},
        {"lora_dora": True, "metric_for_best_model": "loss", "save_strategy": "epoch", "load_best_model_at_end": True},
    ],
)
def test_a_resumed_run_ends_in_the_same_weights(tmp_path, base, keys):
    recipe, run = write(tmp_path, base, **keys), tmp_path / "run"
    assert main([str(recipe)]) == 0
    shutil.move(run, tmp_path / "whole")
    rewind(tmp_path / "whole", run, min(map(step_of, numbered_checkpoints(tmp_path / "whole"))))
    assert main([str(recipe), "--resume"]) == 0
    assert_same(run / "model", tmp_path / "whole/model")


def test_a_run_over_another_base_does_not_go_on(tmp_path, base, tiny_config, tiny_tokenizer, capsys):
    own = shutil.copytree(base, tmp_path / "own")
    recipe = write(tmp_path, own)
    assert main([str(recipe)]) == 0
    shutil.rmtree(tmp_path / "run/model")
    save_model(own, tiny_config, tiny_tokenizer, seed=5)
    assert "the base" in error_of([recipe, "--resume"], capsys)


def test_the_training_of_an_adapter_goes_on(tmp_path, trained, base, capsys):
    recipe = write(tmp_path, trained / "model", lora_rank=None)
    assert main([str(recipe), "--max_steps", "2", "--learning_rate", "0", "--warmup_steps", "0"]) == 0
    assert_same(tmp_path / "run/model", trained / "model")
    assert find_adapter(str(tmp_path / "run/model")).base == str(base)
    # It is no start for the training of a whole model, or of another adapter.
    recipe = write(tmp_path / "other", trained / "model", lora=None, lora_rank=None)
    message = error_of([recipe], capsys)
    assert "lora: true" in message and "training/merge.py" in message and str(base) in message
    recipe = write(tmp_path / "other", trained / "model", lora_rank=8)
    assert "'lora_rank' is 8" in error_of([recipe], capsys)


def test_the_plan_says_what_is_trained(tmp_path, base, capsys):
    assert main([str(write(tmp_path, base)), "--dry-run", "--measure"]) == 0
    assert "frozen; " in capsys.readouterr().out
    assert "'query'" in error_of([write(tmp_path, base, lora_target_modules=["query"]), "--dry-run"], capsys)
