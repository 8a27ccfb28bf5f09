"""Every language has one cell, script by script, and a darker colour the higher its score."""

from __future__ import annotations

import pytest
from matplotlib.text import Text

from tests.training.evaluation.synthetic import LANGUAGES, evaluation, many_languages
from training.evaluation.figures.plots import draw_languages, languages_figure, lay_out
from training.evaluation.records import Evaluation
from training.evaluation.summary import GroupScore, summarize


def summary(*languages):
    return summarize(evaluation(languages, dimensions=(64,), precisions=("float32",)), "large")


def lightness(colour):
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def test_scripts_with_more_languages_come_first_and_the_lowest_score_in_each():
    groups = [GroupScore(name, value, 0.5, 1, 10) for name, value in (("a-X", 0.3), ("b-Y", 0.9), ("c-Y", 0.1))]
    assert lay_out(groups) == ["Y", groups[2], groups[1], "X", groups[0]]


@pytest.mark.parametrize("languages", [LANGUAGES, many_languages(40), many_languages()], ids=len)
def test_what_is_drawn(languages):
    found = summary(*languages)
    figure = languages_figure(found)
    figure.draw_without_rendering()
    grid, scale = figure.axes
    assert {language.partition("-")[0] for language in languages} <= {text.get_text() for text in grid.texts}
    thick = [patch for patch in grid.patches if patch.get_linewidth() > 2]
    assert len(grid.patches) == len(languages) and len(thick) == (10 if len(languages) > 10 else 0)
    assert len({patch.get_xy() for patch in grid.patches}) == len(languages)
    # In grey, too; the black frame can be seen on low scores.
    scores = [cell.macro for cell in lay_out(found.languages) if not isinstance(cell, str)]
    shades = dict(zip(scores, (lightness(patch.get_facecolor()) for patch in grid.patches), strict=True))
    assert [shades[score] for score in sorted(shades)] == sorted(shades.values(), reverse=True)
    assert all(lightness(patch.get_facecolor()) > 0.4 and lightness(patch.get_edgecolor()) == 0 for patch in thick)
    assert scale.get_xlim() == pytest.approx((100 * found.languages[0].macro, 100 * found.languages[-1].macro))
    (title,) = [text for text in grid.findobj(Text) if "languages by script" in text.get_text()]
    for text in (*grid.texts, title, scale.xaxis.label):
        extent = text.get_window_extent()
        assert figure.bbox.contains(*extent.p0) and figure.bbox.contains(*extent.p1), text.get_text()


def test_files_are_the_same_when_drawn_twice_and_absent_without_languages(tmp_path):
    once, again = (draw_languages(summary(*LANGUAGES), tmp_path / each, "of-large") for each in ("once", "again"))
    assert [path.name for path in once] == ["of-large.svg", "of-large.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    made = evaluation(dimensions=(64,), precisions=("float32",))
    clustering = Evaluation(made.models, made.select(task="Groups"))
    assert draw_languages(summarize(clustering, "large"), tmp_path / "none") == [] and not (tmp_path / "none").exists()
