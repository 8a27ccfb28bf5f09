"""Builders by name, and their folders: complete or absent, written by one command at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import pytest

from tests.training.data.gettext_catalogs.gettext_folders import write_catalogs
from training.common.errors import UserError
from training.data.builders import build, builder


def test_options_reach_the_builder(tmp_path):
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
        ("gettext", {"held_out_share": 1.0}, "'held_out_share' cannot be 1.0"),
        ("cldr", {"num_negatives": 0}, "'num_negatives' cannot be 0"),
        ("gettext", {"locale_dirs": "x"}, "'locale_dirs' cannot be 'x'"),
        ("gettext", {"num_negatives": 2.5}, "'num_negatives' cannot be 2.5; give a value such as 8"),
        ("gettext", {"held_out_share": "half"}, "'held_out_share' cannot be 'half'"),
    ],
)
def test_unknown_and_wrong_options(tmp_path, name, options, expected):
    with pytest.raises(UserError, match=expected):
        build(name, tmp_path / "build", 0, options)
    assert not list(tmp_path.iterdir())


@builder("test", format=1)
def write_one(folder, *, seed=0, more=1):
    assert not any(folder.iterdir())
    (folder / "a.txt").write_text("a")
    return {}


def test_the_same_build_is_found_and_another_is_refused(tmp_path, refuses):
    folder = write_one(tmp_path / "out", seed=1)
    written = (folder / "a.txt").stat().st_mtime_ns
    assert write_one(folder, seed=1) == folder and (folder / "a.txt").stat().st_mtime_ns == written
    with refuses(folder, "a test build with other more, seed"):
        write_one(folder, seed=2, more=3)
    (folder / "a.txt").unlink()
    with refuses(folder, "lacks a.txt"):
        write_one(folder, seed=1)


@pytest.mark.parametrize("name", ["precious.txt", "build.json"])
def test_anything_else_is_left_alone(tmp_path, refuses, name):
    (tmp_path / name).write_text("[]")
    for output in (tmp_path, tmp_path / name):
        with refuses(output, "not a finished test build"):
            write_one(output)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["[]"]


def test_a_failed_build_leaves_nothing(tmp_path):
    @builder("test")
    def fails(folder, *, seed=0):
        (folder / "a.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_two_commands_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    written = context.Queue()

    @builder("test")
    def write(folder, *, seed=0):
        (folder / "a.parquet").write_text("half")
        written.put(os.getpid())
        time.sleep(0.3)
        (folder / "a.parquet").write_text("whole")
        return {}

    output = tmp_path / "data"
    both = [context.Process(target=write, args=(output,)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(30)
    assert [each.exitcode for each in both] == [0, 0]
    assert written.get(timeout=30) and written.empty()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (output / "a.parquet").read_text() == "whole"
