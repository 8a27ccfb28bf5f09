from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.merge import main

ROOT = Path(__file__).parents[4]


def test_checkpoints_of_a_run_are_souped(uninterrupted, tmp_path, capsys):
    checkpoints = sorted(map(str, uninterrupted.glob("checkpoint-*")))[-2:]
    assert main([*checkpoints, "--output", str(tmp_path / "soup"), "--weights", "1", "3"]) == 0
    assert "mean of 0.25 run/checkpoint-" in capsys.readouterr().out
    one, two = (load_file(Path(folder) / "model.safetensors") for folder in checkpoints)
    for name, tensor in load_file(tmp_path / "soup" / "model.safetensors").items():
        torch.testing.assert_close(tensor, 0.25 * one[name] + 0.75 * two[name], rtol=0, atol=1e-6)
    # Nothing of the training's own state.
    assert not {path.suffix for path in (tmp_path / "soup").iterdir()} & {".pt", ".pth", ".bin"}
    assert main([*checkpoints, "--output", str(tmp_path / "soup"), "--weights", "1", "3"]) == 0


def test_a_run_stands_for_its_finished_model(uninterrupted, tmp_path, capsys):
    assert main([str(uninterrupted), "--output", str(tmp_path / "soup")]) == 0
    assert "1 run/model" in capsys.readouterr().out
    weights = [load_file(folder / "model.safetensors") for folder in (uninterrupted / "model", tmp_path / "soup")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{run}", "{run}", "--weights", "1"], "1 weights for 2 models"),
        (["{run}", "{run}", "{run}", "--slerp"], "--slerp goes from one model to another, not 3"),
        (["{run}", "{run}", "--slerp", "2"], "--slerp: 2.0 does not lie between 0"),
        (["{run}", "no/such/model"], "no/such/model: no such folder"),
        (["{run}", "--max-shard-size", "large"], "--max-shard-size: 'large' is no size"),
    ],
)
def test_faulty_input_is_told_in_one_line(uninterrupted, tmp_path, capsys, words, part):
    words = [word.format(run=uninterrupted) for word in words]
    assert main([*words, "--output", str(tmp_path / "soup")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and part in error
    assert list(tmp_path.iterdir()) == []


def test_the_script_runs_from_a_checkout(uninterrupted, tmp_path):
    words = [uninterrupted, uninterrupted, "--slerp", "0.25", "--output", tmp_path / "soup"]
    done = subprocess.run(
        [sys.executable, ROOT / "training" / "merge.py", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "slerp of 0.75 run/model, 0.25 run/model, in float32" in done.stdout
