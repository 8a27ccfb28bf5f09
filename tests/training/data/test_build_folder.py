"""Folders that a builder makes: a damaged or foreign record is told in one line, and nothing is touched."""

from __future__ import annotations

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
