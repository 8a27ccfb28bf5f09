"""On a real Slurm of two nodes: data work, and a training that is preempted (`apt-get install slurm-wlm`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.training.common.test_executor import note, note_unless, notes
from tests.training.launch.slurm_cluster import slurm, slurm_cluster, wait_until
from tests.training.recipes import write_single_stage
from training.common.errors import UserError
from training.common.executor import Executor, Phase, SubmittedError, run_phases

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with slurm_cluster():
        yield


def test_phases_run_one_after_the_other_and_errors_come_back(tmp_path):
    executor = Executor("slurm", 2, {"partition": "cpu", "time": "10", "mem_per_cpu_gb": 1})
    fails, note_all = partial(note_unless, tmp_path, UserError("no")), partial(note, tmp_path)
    phases = [Phase("first", fails, 3), Phase("second", note_all, 1)]
    # The second command comes too early and submits nothing.
    for _ in range(2):
        with pytest.raises(SubmittedError):
            run_phases(phases, tmp_path / "tasks", executor)
    jobs = {phase.name: (tmp_path / "tasks" / phase.name / "job").read_text() for phase in phases}
    assert jobs == {"first": "1", "second": "2"}
    wait_until(lambda: not slurm("squeue", "--noheader"))
    assert list(notes(tmp_path)) == ["0", "2"]
    with pytest.raises(UserError, match=r"^no$"):
        run_phases(phases, tmp_path / "tasks", executor)
    phases[0] = Phase("first", note_all, 3)
    with pytest.raises(SubmittedError):
        run_phases(phases, tmp_path / "tasks", executor)
    wait_until(lambda: not slurm("squeue", "--noheader"))
    run_phases(phases, tmp_path / "tasks", executor)
    assert notes(tmp_path) == {"0": "done\ndone\n", "1": "done\n", "2": "done\n"}


def test_a_preempted_training_on_two_nodes_goes_on_by_itself(tmp_path):
    recipe = write_single_stage(tmp_path, max_steps=100, num_train_epochs=None, eval_strategy="no", save_steps=50)
    for name, target in {"training": ROOT / "training", ".venv": Path(sys.prefix)}.items():
        (tmp_path / name).symlink_to(target)
    log = tmp_path / "log.txt"
    options = ["--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60", f"--output={log}"]
    environment = {**os.environ, "PROCESSES": "1", "OMP_NUM_THREADS": "1"}
    command = ["sbatch", *options, str(ROOT / "training/launch/slurm.sh"), str(recipe)]
    job = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).strip()
    wait_until(lambda: log.exists() and "step   5/100" in log.read_text())
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: not slurm("squeue", "--noheader"))
    output, state = log.read_text(), slurm("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in state and "Restarts=1" in state, output
    assert "stopped: SIGTERM at step" in output and "step 100/100" in output
    # After the checkpoint, no step was taken twice.
    assert output.count("step   5/100") == 1 and (tmp_path / "run/model/model.safetensors").exists()
