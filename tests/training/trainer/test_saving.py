"""A damaged checkpoint or record: the file is named, the checkpoint before it is offered, and no traceback is shown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.recipes import error_of, grow_loss, write_single_stage
from training.run_stage import main
from training.trainer.saving import checkpoint_to_resume


@pytest.fixture
def recipe(write_stopped):
    return write_stopped()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(os.urandom(path.stat().st_size))


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]


@pytest.mark.parametrize("damage", [cut, overwrite])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_one_before_offered(recipe, tmp_path, capsys, resumes_exactly, file, damage):
    newest = tmp_path / "run/checkpoint-4"
    damage(newest / file)
    error = error_of([str(recipe), "--resume"], capsys)
    assert error.startswith(f"error: {newest}: cannot be resumed from: {file} cannot be read (")
    assert error.endswith("elsewhere and run the same command with --resume to go on from checkpoint-2")
    if (file, damage) == ("optimizer.pt", cut):
        newest.rename(tmp_path / "elsewhere")
        resumes_exactly(recipe)


@pytest.mark.parametrize("file", [*FILES, "config.json"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over(recipe, tmp_path, caplog, check_same_weights, file):
    (tmp_path / "run/checkpoint-4" / file).unlink()
    assert main([str(recipe), "--resume"]) == 0
    assert f"checkpoint-4 lacks {file}; going on from checkpoint-2" in caplog.text
    check_same_weights(tmp_path / "run")


def test_content_that_does_not_fit_in_the_only_checkpoint(recipe, tmp_path, capsys):
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    newest = tmp_path / "run/checkpoint-4"
    state = torch.load(newest / "optimizer.pt", weights_only=True)
    torch.save({**state, "param_groups": []}, newest / "optimizer.pt")
    error = error_of([str(recipe), "--resume"], capsys)
    assert error.startswith(f"error: {newest}: cannot be resumed from: ") and "number of parameter groups" in error
    assert error.endswith("start again with another output_dir") and not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("damage", [overwrite, lambda path: path.write_text("- 1\n- 2\n")])
@pytest.mark.parametrize("file", ["recipe.yaml", "data.json"])
def test_a_damaged_record_of_the_run_is_named(recipe, tmp_path, capsys, file, damage):
    damage(tmp_path / "run" / file)
    assert error_of([str(recipe), "--resume"], capsys).startswith(f"error: {tmp_path / 'run' / file}: ")


@pytest.mark.parametrize(
    "parts",
    [
        ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
        ("pytorch_model_fsdp.bin", "optimizer.bin"),
        ("pytorch_model.bin", "latest", "global_step4/mp_rank_00_model_states.pt"),
        ("model-00001-of-00002.safetensors", "optimizer.pt"),
    ],
)
def test_sharded_checkpoints_have_all_their_parts(tmp_path, stopped_at_4, parts):
    checkpoint = tmp_path / "checkpoint-4"
    for part in parts:
        (checkpoint / part).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / part).write_bytes(b"")
        for name in ("model.safetensors", "optimizer.pt"):
            if part.endswith(Path(name).suffix) and "/" not in part:
                shutil.copy(stopped_at_4 / "run/checkpoint-4" / name, checkpoint / part)
    for name in ("config.json", "trainer_state.json", "scheduler.pt", "rng_state.pth"):
        shutil.copy(stopped_at_4 / "run/checkpoint-4" / name, checkpoint)
    assert checkpoint_to_resume(tmp_path) == checkpoint


@pytest.mark.parametrize("damage", [cut, overwrite, Path.unlink])
def test_a_training_does_not_end_in_other_weights_than_the_best(tmp_path, capsys, monkeypatch, damage):
    keys = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    # The first evaluation is the best.
    grow_loss(monkeypatch)
    recipe, run = write_single_stage(tmp_path, **keys), tmp_path / "run"
    assert main([str(recipe)]) == 0
    best = run / "checkpoint-5"
    shutil.rmtree(run / "model")
    damage(best / "model.safetensors")
    error = error_of([str(recipe), "--resume"], capsys)
    assert error.startswith(f"error: {best}: is the best checkpoint, but ") and "--resume to end in the last" in error
    assert not (run / "model").exists()
    best.rename(tmp_path / "elsewhere")
    assert main([str(recipe), "--resume"]) == 0
    last, saved = (load_file(run / folder / "model.safetensors") for folder in ("checkpoint-10", "model"))
    torch.testing.assert_close(saved, last, rtol=0, atol=0)
