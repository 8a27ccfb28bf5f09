"""How the commands end: a status and one line, whatever happened."""

from __future__ import annotations

import pytest

from training.data.command import run_command
from training.data.executor import SubmittedError
from training.errors import StoppedError, UserError


def ending_in(error: BaseException) -> int:
    def work() -> None:
        raise error

    return run_command(work)


def test_work_that_is_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.parquet: row 3 is bad"), 2, "error: a.parquet: row 3 is bad"),
        (OSError(28, "No space left on device"), 1, "stopped: [Errno 28] No space left on device. To go on, run"),
        (StoppedError("read, task 3: it failed"), 1, "stopped: read, task 3: it failed. To go on, run"),
        (SubmittedError("submitted to Slurm"), 1, "stopped: submitted to Slurm. To go on, run"),
        (KeyboardInterrupt(), 130, "stopped: interrupted. To go on, run"),
    ],
)
def test_each_way_to_end(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str) -> None:
    assert ending_in(error) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and len(said.splitlines()) == 1


def test_a_fault_of_the_code_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        ending_in(ZeroDivisionError())
