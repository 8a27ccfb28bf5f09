"""Built folders: whole or absent, made once, by one command at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.data.build_folder import build_folder


def _build(output: Path, written: Any, seconds: float) -> None:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "a.parquet").write_text("half")
        written.put(os.getpid())
        time.sleep(seconds)
        (folder / "a.parquet").write_text("whole")
        return {}

    build_folder(output, "kind", {"seed": 0}, write)


def _start(work: Callable[..., None], *given: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, args=given)
    process.start()
    return process


def test_two_commands_build_once(tmp_path: Path) -> None:
    written = multiprocessing.get_context("fork").Queue()
    both = [_start(_build, tmp_path / "data", written, 0.3) for _ in range(2)]
    for each in both:
        each.join(30)
    assert [each.exitcode for each in both] == [0, 0]
    assert written.get(timeout=30) and written.empty()
    assert (tmp_path / "data/a.parquet").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    written = context.Queue()
    killed = _start(_build, tmp_path / "data", written, 60)
    assert written.get(timeout=30) == killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(30)
    assert not (tmp_path / "data").exists() and list(tmp_path.glob(".data*"))
    _build(tmp_path / "data", context.Queue(), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (tmp_path / "data/a.parquet").read_text() == "whole"
