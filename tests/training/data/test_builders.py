"""Builders by name, and their folders: complete or absent, written by one command at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.gettext_catalogs.gettext_folders import write_catalogs
from training.common.errors import UserError
from training.data.build_folder import build_folder
from training.data.builders import build

Refuses = Callable[..., AbstractContextManager[None]]


def test_options_reach_the_builder(tmp_path: Path) -> None:
    catalogs = write_catalogs(tmp_path / "locale", ["de", "fr"])
    options = {"locale_dirs": [str(catalogs)], "held_out_share": 0.5, "num_negatives": 3}
    folder = build("gettext", tmp_path / "build", 7, options)
    recorded = json.loads((folder / "build.json").read_text())["options"]
    assert recorded == {**recorded, **options, "seed": 7}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("osm", {}, "unknown builder 'osm'; there are cldr, gettext"),
        ("gettext", {"locale_dir": ["x"]}, "unknown key 'locale_dir'; did you mean 'locale_dirs'?"),
        ("cldr", {"locale_dirs": ["x"]}, "'cldr'.*unknown key 'locale_dirs'"),
        ("gettext", {"seed": 3}, "unknown key 'seed'"),
        ("gettext", {"output_dir": "x"}, "unknown key 'output_dir'"),
        ("gettext", {"locale_dirs": "x"}, "'locale_dirs' cannot be 'x'"),
        ("gettext", {"locale_dirs": [3]}, "'locale_dirs' cannot be"),
        ("gettext", {"num_negatives": 2.5}, "'num_negatives' cannot be 2.5; give a value such as 8"),
        ("gettext", {"num_negatives": True}, "'num_negatives' cannot be True"),
        ("gettext", {"held_out_share": "half"}, "'held_out_share' cannot be 'half'"),
        ("cldr", {"languages": "de"}, "'languages' cannot be 'de'"),
    ],
)
def test_unknown_and_wrong_options(tmp_path: Path, name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        build(name, tmp_path / "build", 0, options)
    assert not list(tmp_path.iterdir())


def _write(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("a")
    return {}


def test_the_same_build_is_found_and_another_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    folder = build_folder(tmp_path / "out", "test", {"seed": 1}, _write)
    again = lambda options: build_folder(folder, "test", options, lambda _: pytest.fail("built twice"))  # noqa: E731
    assert again({"seed": 1}) == folder
    with refuses(folder, "a test build with other more, seed"):
        again({"seed": 2, "more": 1})
    (folder / "a.txt").unlink()
    with refuses(folder, "lacks a.txt of its test build"):
        again({"seed": 1})


def test_anything_else_is_left_alone(tmp_path: Path, refuses: Refuses) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("keep")
    for output in (tmp_path, file):
        with refuses(output, "not a finished test build"):
            build_folder(output, "test", {}, _write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep"]


ODD = [b"[]", b"3", b'{"options": 3, "files": []}', b'{"options": {}, "files": 5}', b'{"options": {}, "files": [3]}']
ODD += [b"\xff\xfe", b"", b"[" * 100_000, b'{"options": null, "files": ["a"]}']


@pytest.mark.parametrize("record", ODD, ids=lambda record: repr(record[:30]))
def test_an_odd_record_is_refused(tmp_path: Path, refuses: Refuses, record: bytes) -> None:
    folder = build_folder(tmp_path / "out", "test", {}, _write)
    (folder / "build.json").write_bytes(record)
    with refuses(folder, "not a finished test build"):
        build_folder(folder, "test", {}, _write)
    assert (folder / "build.json").read_bytes() == record


def _build(output: Path, written: Any, seconds: float) -> None:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "a.parquet").write_text("half")
        written.put(os.getpid())
        time.sleep(seconds)
        (folder / "a.parquet").write_text("whole")
        return {}

    build_folder(output, "kind", {"seed": 0}, write)


def _start(*given: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_build, args=given)
    process.start()
    return process


def _assert_whole(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["data"]
    assert (folder / "data/a.parquet").read_text() == "whole"


def test_two_commands_build_once(tmp_path: Path) -> None:
    written = multiprocessing.get_context("fork").Queue()
    both = [_start(tmp_path / "data", written, 0.3) for _ in range(2)]
    for each in both:
        each.join(30)
    assert [each.exitcode for each in both] == [0, 0]
    assert written.get(timeout=30) and written.empty()
    _assert_whole(tmp_path)


def test_what_a_killed_build_left_is_cleared(tmp_path: Path) -> None:
    written = multiprocessing.get_context("fork").Queue()
    killed = _start(tmp_path / "data", written, 60)
    assert written.get(timeout=30) == killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(30)
    assert not (tmp_path / "data").exists() and list(tmp_path.glob(".data*"))
    # The killed process may hold the lock of its queue.
    _build(tmp_path / "data", multiprocessing.get_context("fork").Queue(), 0)
    _assert_whole(tmp_path)
