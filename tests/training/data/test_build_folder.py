"""Folders that a builder makes: whole or absent, by one command at a time; a damaged record is told in one line."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from training.data.build_folder import build_folder

Refuses = Callable[..., AbstractContextManager[None]]


def _write(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("a")
    return {}


def test_the_same_build_is_found(tmp_path: Path) -> None:
    folder = build_folder(tmp_path / "out", "test", {"seed": 1}, _write)
    assert build_folder(folder, "test", {"seed": 1}, lambda _: pytest.fail("built twice")) == folder


ODD = [b"[]", b"3", b'{"options": 3, "files": []}', b'{"options": {}, "files": 5}', b'{"options": {}, "files": [3]}']
ODD += [b"\xff\xfe", b"", b"[" * 100_000, b'{"options": null, "files": ["a"]}']


@pytest.mark.parametrize("record", ODD, ids=lambda record: repr(record[:30]))
def test_an_odd_record_is_refused(tmp_path: Path, refuses: Refuses, record: bytes) -> None:
    folder = build_folder(tmp_path / "out", "test", {}, _write)
    (folder / "build.json").write_bytes(record)
    with refuses(folder, "no finished test build"):
        build_folder(folder, "test", {}, _write)
    assert (folder / "build.json").read_bytes() == record


# Several commands, and killed ones


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
