"""Short names stay different, and lines differ in more than colour."""

from __future__ import annotations

import sys

from training.evaluation.figures.style import line_style, new_figure, short_labels, shortened


def test_as_many_parts_as_tell_names_apart():
    assert short_labels(["codefuse-ai/F2LLM-v2-80M", "intfloat/e5"]) == ["F2LLM-v2-80M", "e5"]
    assert short_labels(["runs/a/model", "runs/b/model/", "c"]) == ["a/model", "b/model", "c"]
    assert short_labels(["same", "same", "/"]) == ["same", "same", ""]


def test_long_names_lose_their_middle_and_dollars_do_not_begin_formulas():
    assert shortened("abcdefghijklmnop", 8) == "abc…mnop"
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("$5 and $6", 20) == r"\$5 and \$6"


def test_neighbouring_lines_differ_in_every_trait():
    styles = [line_style(number) for number in range(28)]
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 28
    assert all(styles[n][trait] != styles[n + 1][trait] for n in range(27) for trait in styles[0])


def test_missing_matplotlib_is_one_line(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refuses("matplotlib", "pip install matplotlib"):
        new_figure(3, 2)
