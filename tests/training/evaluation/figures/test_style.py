"""Short names stay different, and a figure's files depend on nothing but the figure."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from training.evaluation.figures.style import LINES, new_figure, save, short_labels, shortened

Refuses = Callable[..., AbstractContextManager[None]]


def test_as_many_parts_as_tell_names_apart() -> None:
    assert short_labels(["codefuse-ai/F2LLM-v2-80M", "intfloat/e5"]) == ["F2LLM-v2-80M", "e5"]
    assert short_labels(["runs/a/model", "runs/b/model/", "org/c"]) == ["a/model", "b/model", "c"]
    assert short_labels(["x/a/m", "y/a/m", "z/b/m", "m"]) == ["x/a/m", "y/a/m", "b/m", "m"]
    assert short_labels(["same", "same", "/"]) == ["same", "same", ""]


def test_long_names_lose_their_middle_and_dollars_are_no_mathematics() -> None:
    assert shortened("abcdefghijklmnop", 8) == "abc…mnop"
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("$5 and $6", 20) == r"\$5 and \$6"


def test_lines_are_told_apart_in_grey() -> None:
    for one, other in ((a, b) for a in LINES for b in LINES if a is not b):
        assert all(one[trait] != other[trait] for trait in ("linestyle", "marker", "color"))


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    def drawn(folder: Path) -> list[bytes]:
        figure = new_figure(3, 2)
        axes = figure.subplots()
        axes.plot([1, 2], [3, 4], label="line", marker="o")
        axes.legend()
        return [path.read_bytes() for path in save(figure, folder, "drawn")]

    first, second = drawn(tmp_path / "first"), drawn(tmp_path / "second/below")
    assert first == second
    assert b">line</text>" in first[0] and first[1].startswith(b"\x89PNG")


def test_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch, refuses: Refuses) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refuses("matplotlib", "pip install matplotlib"):
        new_figure(3, 2)
