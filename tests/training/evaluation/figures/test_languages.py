"""Every language has one cell, and a script that fits into a row is not split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.text import Text

from tests.training.evaluation.synthetic import LANGUAGES, evaluation, many_languages
from training.evaluation.figures.languages import Cell, draw_languages, languages_figure, lay_out
from training.evaluation.records import Evaluation
from training.evaluation.summary import GroupScore, Summary, summarize


def groups(*sizes: int) -> list[GroupScore]:
    """A script of each size; the scores go down."""
    names = [f"a{number:02}-S{script:03}" for script, size in enumerate(sizes) for number in range(size)]
    return [GroupScore(name, 1 - number / 1000, 0.5, 1, 10) for number, name in enumerate(names)]


def by_script(cells: list[Cell]) -> dict[str, list[Cell]]:
    """The cells of each script in order, that of its name first."""
    scripts: dict[str, list[Cell]] = {}
    for cell in cells:
        scripts.setdefault(cell.name.partition("-")[2] or cell.text, []).append(cell)
    return scripts


def summary(*languages: str) -> Summary:
    return summarize(evaluation(languages, dimensions=(64,), precisions=("float32",)), "large")


LAYOUTS = [groups(1), groups(3, 2, 1), groups(15), groups(16), groups(31, 15, 14, 1), groups(*range(40, 0, -1))]
LAYOUTS.append(groups(*[5] * 9, *[1] * 20))


@pytest.mark.parametrize("languages", LAYOUTS)
def test_every_language_has_a_cell_and_scripts_that_fit_a_row(languages: list[GroupScore]) -> None:
    cells = lay_out(languages)
    scored = [(cell.name, cell.score) for cell in cells if cell.score is not None]
    assert sorted(scored) == sorted((group.name, group.macro) for group in languages)
    assert len({(cell.row, cell.column) for cell in cells}) == len(cells)
    assert all(0 <= cell.column < 16 for cell in cells)
    # No row is left empty.
    assert {cell.row for cell in cells} == set(range(max(cell.row for cell in cells) + 1))
    scripts = by_script(cells).values()
    assert [len(found) for found in scripts] == sorted((len(found) for found in scripts), reverse=True)
    for found in scripts:
        name, *members = found
        scores = [cell.score for cell in members]
        assert (name.score, name.name) == (None, "") and scores == sorted(scores)
        if len(members) < 16:
            assert {cell.row for cell in found} == {name.row}
            assert [cell.column for cell in found] == list(range(name.column, name.column + len(found)))
        else:
            assert name.column == 0 and {cell.column for cell in members} == set(range(1, 16))
            # It shares its rows with no other.
            rows = {cell.row for cell in found}
            assert [cell for cell in cells if cell.row in rows] == found


def lightness(colour: tuple[float, ...]) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


@pytest.mark.parametrize("languages", [LANGUAGES, many_languages(40), many_languages()], ids=len)
def test_what_is_drawn(languages: tuple[str, ...]) -> None:
    found = summary(*languages)
    figure = languages_figure(found)
    figure.draw_without_rendering()
    grid, scale = figure.axes
    assert {language.partition("-")[0] for language in languages} <= {text.get_text() for text in grid.texts}
    thick = [patch for patch in grid.patches if patch.get_linewidth() > 2]
    assert len(grid.patches) == len(languages) and len(thick) == (10 if len(languages) > 10 else 0)
    # The higher the score, the darker, in grey, too; the black frame can be seen on low scores.
    shades = {
        cell.score: lightness(patch.get_facecolor()) for cell, patch in zip(cells_of(found), grid.patches, strict=True)
    }
    assert [shades[score] for score in sorted(shades)] == sorted(shades.values(), reverse=True)
    assert all(lightness(patch.get_facecolor()) > 0.4 and lightness(patch.get_edgecolor()) == 0 for patch in thick)
    assert scale.get_xlim() == pytest.approx((100 * found.languages[0].macro, 100 * found.languages[-1].macro))
    (title,) = [text for text in grid.findobj(Text) if "languages by script" in text.get_text()]
    for text in (*grid.texts, title, scale.xaxis.label):
        extent = text.get_window_extent()
        assert figure.bbox.contains(*extent.p0) and figure.bbox.contains(*extent.p1), text.get_text()
    # Cells have one size in all figures.
    cell = grid.patches[0].get_window_extent()
    assert (cell.width / figure.dpi, cell.height / figure.dpi) == pytest.approx((0.9 * 0.62, 0.9 * 0.42))


def cells_of(found: Summary) -> list[Cell]:
    return [cell for cell in lay_out(found.languages) if cell.score is not None]


def test_equal_scores_need_no_scale() -> None:
    found = summary(*LANGUAGES)
    same = [replace(group, macro=0.5) for group in found.languages]
    figure = languages_figure(replace(found, languages=same))
    assert len(figure.axes) == 1 and len({patch.get_facecolor() for patch in figure.axes[0].patches}) == 1


def test_files_are_the_same_when_drawn_twice_and_absent_without_languages(tmp_path: Path) -> None:
    once, again = (draw_languages(summary(*LANGUAGES), tmp_path / each, "of-large") for each in ("once", "again"))
    assert [path.name for path in once] == ["of-large.svg", "of-large.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    made = evaluation(dimensions=(64,), precisions=("float32",))
    clustering = Evaluation(made.models, made.select(task="Groups"))
    assert draw_languages(summarize(clustering, "large"), tmp_path / "none") == [] and not (tmp_path / "none").exists()
