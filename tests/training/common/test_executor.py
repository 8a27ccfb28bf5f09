"""Tasks run once on every executor, their errors arrive unchanged, and killed worker processes are noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from operator import truediv
from pathlib import Path

import dill
import psutil
import pytest

from training.common.errors import StoppedError, UserError
from training.common.executor import Executor, Phase, SubmittedError, read_executor, run_in_workers, run_phases

ROOT = Path(__file__).resolve().parents[3]
DISK_FULL = OSError(28, "No space left on device")


def note(folder, task):
    with (folder / f"{task}.txt").open("a") as file:
        file.write("done\n")


def note_unless(folder, error, task):
    if task == 1:
        raise error
    note(folder, task)


def die_once(folder, task):
    if task == 1 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    note(folder, task)


def notes(folder):
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}


@pytest.mark.parametrize(
    "executor", [Executor(workers=1), Executor(workers=2), pytest.param(Executor("ray"), marks=pytest.mark.slow)]
)
def test_another_executor_goes_on_where_the_first_stopped_and_no_task_runs_twice(tmp_path, executor):
    if executor.name == "ray":
        pytest.importorskip("ray")
    with pytest.raises(UserError):
        stops = Phase("first", partial(note_unless, tmp_path, UserError("no")), 4)
        run_phases([stops], tmp_path / "tasks", Executor(workers=1))
    assert list(notes(tmp_path)) == ["0"]
    phases = [Phase("first", partial(note, tmp_path), 4), Phase("none", partial(note, tmp_path), 0)]
    for _ in range(2):
        run_phases(phases, tmp_path / "tasks", executor)
        assert notes(tmp_path) == dict.fromkeys("0123", "done\n")


@pytest.mark.parametrize(
    ("executor", "error", "raised", "message"),
    [
        *((Executor(workers=workers), UserError("row 7 is bad"), UserError, "^row 7 is bad$") for workers in (1, 2)),
        (Executor(workers=1), DISK_FULL, OSError, "No space left on device"),
        (Executor(workers=2), DISK_FULL, StoppedError, r"first, task 1: OSError: .*No space left on device"),
    ],
)
def test_a_failed_task_says_why(tmp_path, executor, error, raised, message):
    phase = Phase("first", partial(note_unless, tmp_path, error), 3)
    with pytest.raises(raised, match=message):
        run_phases([phase], tmp_path / "tasks", executor)


def test_a_worker_that_the_system_kills_stops_the_work_and_the_rest_goes_on_later(tmp_path):
    phase = Phase("first", partial(die_once, tmp_path), 3)
    with pytest.raises(StoppedError, match="killed a worker process"):
        run_phases([phase], tmp_path / "tasks", Executor(workers=2))
    run_phases([phase], tmp_path / "tasks", Executor(workers=2))
    assert list(notes(tmp_path)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((None, None), ("ray", Executor("ray")), ('{"workers": 3}', Executor("local", 3))),
        ('{"name": "slurm", "workers": 8, "partition": "cpu"}', Executor("slurm", 8, {"partition": "cpu"})),
    ],
)
def test_the_recipe_key(value, expected):
    assert read_executor(value) == expected


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        *[("dask", "'dask'"), ('{"name": 3}', "3"), ("{", "JSON"), ('{"workers": 0}', "0")],
        *[('{"workers": "two"}', "'two'"), ('{"queue": "long"}', "queue")],
        ('{"name": "jobs", "token": "hf_x"}', "'token' would be copied"),
    ],
)
def test_a_faulty_recipe_key(refuses, value, wrong):
    with refuses("executor", wrong):
        read_executor(value)


@pytest.mark.parametrize(
    ("options", "wrong"), [({}, "partition"), ({"tasks": 3}, "tasks"), ({"sbatch_args": "x"}, "mapping")]
)
def test_options_that_an_executor_does_not_know(tmp_path, refuses, options, wrong):
    with refuses("executor 'slurm' cannot be used", wrong):
        run_phases([Phase("first", partial(note, tmp_path), 2)], tmp_path / "tasks", Executor("slurm", None, options))


SLURM = {
    "sbatch": """cd "$(dirname "$0")"; number=$(($(ls | grep -c script) + 1))
cp "${!#}" script$number; printf '%s\\n' "$@" > words$number; echo "Submitted batch job $number\"""",
    "squeue": 'grep -x "$3" "$(dirname "$0")/queue"',
    "scontrol": "echo node1",
}
OPTIONS = {"partition": "cpu", "time": "1:00:00"}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stands in for Slurm: ``sbatch`` keeps each script and its words; jobs in the file ``queue`` have not ended."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in SLURM.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").touch()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_NODELIST", "node1")
    return folder


def submit(phases, folder, options=OPTIONS):
    with pytest.raises(SubmittedError, match="run the same command again"):
        run_phases(phases, folder / "tasks", Executor("slurm", 8, options))


def test_slurm_gets_the_whole_chain_and_asks_to_come_back(tmp_path, slurm):
    phases = [Phase("first", partial(note, tmp_path), 2), Phase("second", partial(note, tmp_path), 1)]
    submit(phases, tmp_path)
    first, second = ((slurm / f"script{number}").read_text() for number in (1, 2))
    for line in ("--partition=cpu", "--array=0-1%8", "--kill-on-invalid-dep=yes", "--job-name=f2llm-first"):
        assert f"#SBATCH {line}\n" in first
    # datatrove's script is found as it stands beside this interpreter.
    assert f"\nexport PATH={Path(sys.executable).parent}:$PATH\n" in first
    assert first.rstrip().endswith(f"launch_pickled_pipeline {tmp_path}/tasks/first/executor.pik")
    assert "--array=0-0%8" in second and "--dependency=afterok:1\n" in (slurm / "words2").read_text()
    # No job for statistics.
    assert not (slurm / "script3").exists()
    # A command that comes too early submits nothing.
    (slurm / "queue").write_text("1\n2\n")
    submit(phases, tmp_path)
    assert not (slurm / "script3").exists()


def test_a_task_that_failed_on_slurm_is_reported_once_and_then_tried_again(tmp_path, slurm):
    phase = Phase("first", partial(note_unless, tmp_path, UserError("row 7 is bad")), 3)
    submit([phase], tmp_path)
    executor = dill.loads((tmp_path / "tasks/first/executor.pik").read_bytes())
    for task in range(3):
        with nullcontext() if task != 1 else pytest.raises(UserError):
            executor._run_for_rank(task)
    with pytest.raises(UserError, match=r"^row 7 is bad$"):
        run_phases([phase], tmp_path / "tasks", Executor("slurm", 8, OPTIONS))
    submit([phase], tmp_path)
    assert "--array=0-0%8" in (slurm / "script2").read_text()
    assert (tmp_path / "tasks/first/ranks_to_run.json").read_text() == "[1]"


def test_what_the_user_says_of_slurm_jobs_counts(tmp_path, slurm):
    options = {"env_command": "source here", "sbatch_args": {"kill-on-invalid-dep": "no", "account": "x"}}
    submit([Phase("first", partial(note, tmp_path), 1)], tmp_path, {**OPTIONS, **options, "job_name": "mine"})
    script = (slurm / "script1").read_text()
    for line in ("#SBATCH --job-name=mine", "#SBATCH --kill-on-invalid-dep=no", "#SBATCH --account=x", "source here"):
        assert f"{line}\n" in script
    assert "export PATH" not in script


@pytest.mark.parametrize("sbatch", ["#!/bin/bash\nexit 1", None])
def test_a_job_that_is_not_accepted(tmp_path, slurm, monkeypatch, refuses, sbatch):
    if sbatch:
        (slurm / "sbatch").write_text(sbatch)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    with refuses("executor 'slurm': the job was not accepted", "sbatch"):
        run_phases([Phase("first", partial(note, tmp_path), 2)], tmp_path / "tasks", Executor("slurm", 8, OPTIONS))


def note_and_wait(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def test_every_call_comes_back_with_its_arguments():
    assert dict(run_in_workers(truediv, [(6, 2), (6, 3), (6, 4)], workers=2)) == {(6, 2): 3, (6, 3): 2, (6, 4): 1.5}
    with pytest.raises(ZeroDivisionError):
        list(run_in_workers(truediv, [(1, 0)], workers=1))


def test_processes_end_with_the_command_that_was_killed(tmp_path):
    script = (
        "from tests.training.common.test_executor import note_and_wait\n"
        "from training.common.executor import run_in_workers\n"
        f"list(run_in_workers(note_and_wait, [({str(tmp_path)!r},)], 1))\n"
    )
    command = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        _wait_until(lambda: any(tmp_path.iterdir()))
    finally:
        command.kill()
        command.wait()
    worker = int(next(tmp_path.iterdir()).name)
    _wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)


def _wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
