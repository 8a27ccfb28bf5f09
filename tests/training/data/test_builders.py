"""Builders by name, and their folders: complete or absent, written by one command at a time."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

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
        ("cldr", {"seed": 1}, "'seed' is not one of 'builder_options'"),
        ("gettext", {"held_out_share": 1.0}, "'held_out_share' cannot be 1.0"),
        ("cldr", {"held_out_share": 0}, "'held_out_share' cannot be 0"),
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
    with refuses(folder, "a test build that differs in more, seed"):
        write_one(folder, seed=2, more=3)
    (folder / "a.txt").unlink()
    with refuses(folder, "differs in a.txt"):
        write_one(folder, seed=1)


@pytest.mark.parametrize("name", ["precious.txt", "build.json"])
def test_anything_else_is_left_alone(tmp_path, refuses, name):
    (tmp_path / name).write_text("[]")
    for output in (tmp_path, tmp_path / name):
        with refuses(output, "not a finished test build"):
            write_one(output)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["[]"]


def test_two_commands_build_once_or_nothing(tmp_path):
    written = []

    @builder("test")
    def write(folder, *, seed=0):
        (folder / "a.parquet").write_text("half")
        written.append(folder)
        time.sleep(0.3)
        if seed:
            raise OSError("disk full")
        return {}

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "out", seed=1)
    assert not any(tmp_path.iterdir())
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, [tmp_path / "out"] * 2)) == [tmp_path / "out"] * 2
    assert len(written) == 2 and [path.name for path in tmp_path.iterdir()] == ["out"]
