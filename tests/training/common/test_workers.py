from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from training.common.errors import StoppedError
from training.common.workers import run_in_workers

ROOT = Path(__file__).resolve().parents[3]


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
        "from tests.training.common.test_workers import note_and_wait\n"
        "from training.common.workers import run_in_workers\n"
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
