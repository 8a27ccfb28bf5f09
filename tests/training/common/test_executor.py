"""Tasks run once on every executor, their errors arrive unchanged, and killed worker processes are noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import psutil
import pytest

from training.common.errors import StoppedError, UserError
from training.common.executor import Executor, Phase, SubmittedError, read_executor, run_in_workers, run_phases

ROOT = Path(__file__).resolve().parents[3]
Refuses = Callable[..., AbstractContextManager[None]]


def note(folder: Path, task: int) -> None:
    with (folder / f"{task}.txt").open("a") as file:
        file.write("done\n")


def note_unless(folder: Path, error: Exception, task: int) -> None:
    if task == 1:
        raise error
    note(folder, task)


def notes(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}


@pytest.mark.parametrize("workers", [1, 2])
def test_each_task_runs_once(tmp_path: Path, workers: int) -> None:
    phases = [Phase("first", partial(note, tmp_path), 3), Phase("none", partial(note, tmp_path), 0)]
    for _ in range(2):
        run_phases(phases, tmp_path / "tasks", Executor(workers=workers))
    assert notes(tmp_path) == {"0": "done\n", "1": "done\n", "2": "done\n"}


def test_another_executor_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        stops = Phase("first", partial(note_unless, tmp_path, UserError("no")), 3)
        run_phases([stops], tmp_path / "tasks", Executor(workers=1))
    assert list(notes(tmp_path)) == ["0"]
    run_phases([Phase("first", partial(note, tmp_path), 3)], tmp_path / "tasks", Executor(workers=2))
    assert notes(tmp_path) == {"0": "done\n", "1": "done\n", "2": "done\n"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_of_the_user_arrives_as_one(tmp_path: Path, refuses: Refuses, workers: int) -> None:
    phase = Phase("first", partial(note_unless, tmp_path, UserError("a.parquet: row 7 is bad; drop it")), 2)
    with refuses("a.parquet: row 7 is bad; drop it"):
        run_phases([phase], tmp_path / "tasks", Executor(workers=workers))


def test_any_other_failure_says_which_task(tmp_path: Path) -> None:
    phase = Phase("first", partial(note_unless, tmp_path, OSError(28, "No space left on device")), 2)
    with pytest.raises(StoppedError, match=r"first, task 1: OSError: .*No space left on device"):
        run_phases([phase], tmp_path / "tasks", Executor(workers=2))
    with pytest.raises(OSError, match="No space left on device"):
        run_phases([phase], tmp_path / "tasks", Executor(workers=1))


def die(folder: Path, task: int) -> None:
    if task == 1 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    note(folder, task)


def test_a_worker_that_the_system_kills_stops_the_work_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    phase = Phase("first", partial(die, tmp_path), 3)
    with pytest.raises(StoppedError, match="killed a worker process"):
        run_phases([phase], tmp_path / "tasks", Executor(workers=2))
    run_phases([phase], tmp_path / "tasks", Executor(workers=2))
    assert list(notes(tmp_path)) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("", None),
        ("ray", Executor("ray")),
        ('{"name": "slurm", "workers": 8, "partition": "cpu"}', Executor("slurm", 8, {"partition": "cpu"})),
        ('{"workers": 3}', Executor("local", 3)),
    ],
)
def test_the_recipe_key(value: str | None, expected: Executor | None) -> None:
    assert read_executor(value) == expected


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        *[("dask", "'dask'"), ('{"name": 3}', "3"), ("{", "JSON"), ('{"workers": 0}', "0")],
        *[('{"workers": "two"}', "'two'"), ('{"name": "jobs", "token": "hf_secret"}', "`hf auth login`")],
        ('{"name": "jobs", "secrets": {"HF_TOKEN": "hf_secret"}}', "`hf auth login`"),
    ],
)
def test_a_faulty_recipe_key(refuses: Refuses, value: str, wrong: str) -> None:
    with refuses("executor: ", wrong):
        read_executor(value)


def test_options_that_an_executor_does_not_know(tmp_path: Path, refuses: Refuses) -> None:
    phase = Phase("first", partial(note, tmp_path), 2)
    with refuses("executor 'local' cannot be used", "queue"):
        run_phases([phase], tmp_path / "tasks", Executor(workers=2, options={"queue": "long"}))
    with refuses("executor 'slurm' cannot be used", "partition"):
        run_phases([phase], tmp_path / "tasks", Executor("slurm"))


def test_slurm_is_told_the_whole_chain_and_asks_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datatrove.executor

    submitted = []

    class Recorder:
        def __init__(self, **keywords: object) -> None:
            self.keywords = keywords

        def get_incomplete_ranks(self) -> list[int]:
            return list(range(self.keywords["tasks"]))

        def run(self) -> None:
            submitted.append(self)

    monkeypatch.setattr(datatrove.executor, "SlurmPipelineExecutor", Recorder)
    phases = [Phase("first", partial(note, tmp_path), 2), Phase("second", partial(note, tmp_path), 1)]
    with pytest.raises(SubmittedError, match="run the same command again"):
        run_phases(phases, tmp_path / "tasks", Executor("slurm", options={"partition": "cpu", "time": "1:00:00"}))
    first, second = submitted
    assert first.keywords["depends"] is None and second.keywords["depends"] is first
    assert first.keywords["partition"] == "cpu" and second.keywords["tasks"] == 1


# Worker processes


def divide(numerator: int, denominator: int) -> float:
    return numerator / denominator


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def note_and_wait(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def test_every_call_comes_back_with_its_arguments() -> None:
    found = dict(run_in_workers(divide, [(6, 2), (6, 3), (6, 4)], workers=2))
    assert found == {(6, 2): 3, (6, 3): 2, (6, 4): 1.5}


def test_what_a_call_raises_arrives_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_in_workers(divide, [(1, 0)], workers=1))


def test_a_killed_process_is_noticed() -> None:
    with pytest.raises(StoppedError, match="killed a worker process"):
        list(run_in_workers(kill_this_process, [()], workers=1))


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_processes_end_with_the_command_that_was_killed(tmp_path: Path, start_method: str) -> None:
    script = (
        "from tests.training.common.test_executor import note_and_wait\n"
        "from training.common.executor import run_in_workers\n"
        f"list(run_in_workers(note_and_wait, [({str(tmp_path)!r},)], 1, {start_method!r}))\n"
    )
    command = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        _wait_until(lambda: any(tmp_path.iterdir()))
    finally:
        command.kill()
        command.wait()
    worker = int(next(tmp_path.iterdir()).name)
    _wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
