"""Builders are called by name with the options that a recipe gives, and with no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.data.gettext_catalogs.gettext_folders import write_catalogs
from training.common.errors import UserError
from training.data.builders import build


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
