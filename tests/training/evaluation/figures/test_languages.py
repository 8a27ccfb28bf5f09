"""Every language has one cell, and no script is torn apart that fits in a row."""

from __future__ import annotations

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
    return [GroupScore(name, 1 - place / 1000, 0.5, 1, 10) for place, name in enumerate(names)]


def by_script(cells: list[Cell]) -> dict[str, list[Cell]]:
    """The cells of each script in order, that of its name first."""
    scripts: dict[str, list[Cell]] = {}
    for cell in cells:
        scripts.setdefault(cell.name.partition("-")[2] or cell.text, []).append(cell)
    return scripts


def summary(*languages: str) -> Summary:
    made = evaluation(languages, dimensions=(64,), precisions=("float32",))
    return summarize(made, "large")


LAYOUTS = [groups(1), groups(3, 2, 1), groups(15), groups(16), groups(31, 15, 14, 1), groups(*range(40, 0, -1))]
LAYOUTS.append(groups(*[5] * 9, *[1] * 20))


@pytest.mark.parametrize("languages", LAYOUTS)
def test_every_language_has_one_cell_and_none_overlap(languages: list[GroupScore]) -> None:
    cells = lay_out(languages)
    assert sorted(cell.name for cell in cells if cell.score is not None) == sorted(group.name for group in languages)
    assert {cell.name: cell.score for cell in cells if cell.name} == {group.name: group.macro for group in languages}
    assert len({(cell.row, cell.column) for cell in cells}) == len(cells)
    assert all(0 <= cell.column < 16 for cell in cells)
    # No row is left empty.
    assert {cell.row for cell in cells} == set(range(max(cell.row for cell in cells) + 1))


@pytest.mark.parametrize("languages", LAYOUTS)
def test_a_script_that_fits_in_a_row_is_in_one(languages: list[GroupScore]) -> None:
    for found in by_script(lay_out(languages)).values():
        name, *members = found
        assert (name.score, name.name) == (None, "")
        if len(members) < 16:
            assert {cell.row for cell in found} == {name.row}
            assert [cell.column for cell in found] == list(range(name.column, name.column + len(found)))
        else:
            assert name.column == 0 and {cell.column for cell in members} == set(range(1, 16))
            # It shares its rows with no other.
            rows = {cell.row for cell in found}
            assert [cell for cell in lay_out(languages) if cell.row in rows] == found


def test_large_scripts_come_first_and_low_scores_before_high_ones() -> None:
    cells = lay_out(groups(2, 5, 3))
    assert [cell.text for cell in cells if cell.score is None] == ["S001", "S002", "S000"]
    for _, *members in by_script(cells).values():
        scores = [cell.score for cell in members]
        assert scores == sorted(scores)


@pytest.mark.parametrize("languages", [LANGUAGES, many_languages(40), many_languages()], ids=len)
def test_what_is_drawn(languages: tuple[str, ...]) -> None:
    drawn = summary(*languages)
    figure = languages_figure(drawn)
    figure.draw_without_rendering()
    grid, scale = figure.axes
    written = {text.get_text() for text in grid.texts}
    assert {language.partition("-")[0] for language in languages} <= written
    thick = [patch for patch in grid.patches if patch.get_linewidth() > 2]
    assert len(grid.patches) == len(languages) and len(thick) == (10 if len(languages) > 10 else 0)
    # The lowest score is the darkest, the highest white, and the scale says so.
    greys = [patch.get_facecolor()[0] for patch in grid.patches]
    assert min(greys) == pytest.approx(0.3) and max(greys) == 1
    assert scale.get_xlim() == pytest.approx((100 * drawn.languages[0].macro, 100 * drawn.languages[-1].macro))
    (title,) = [text for text in grid.findobj(Text) if "languages by script" in text.get_text()]
    for text in (*grid.texts, title, scale.xaxis.label):
        extent = text.get_window_extent()
        assert figure.bbox.contains(*extent.p0) and figure.bbox.contains(*extent.p1), text.get_text()


def test_cells_are_of_one_size_however_few_they_are() -> None:
    def size(languages: tuple[str, ...]) -> tuple[float, float]:
        figure = languages_figure(summary(*languages))
        extent = figure.axes[0].patches[0].get_window_extent()
        return extent.width, extent.height

    assert size(LANGUAGES) == pytest.approx(size(many_languages()))


def test_equal_scores_need_no_scale() -> None:
    found = summary(*LANGUAGES)
    same = [GroupScore(group.name, 0.5, 0.5, 1, 10) for group in found.languages]
    figure = languages_figure(Summary(**{**found.__dict__, "languages": same}))
    assert len(figure.axes) == 1 and {patch.get_facecolor()[0] for patch in figure.axes[0].patches} == {1}


def test_files_are_the_same_when_drawn_twice(tmp_path: Path) -> None:
    once, again = (draw_languages(summary(*LANGUAGES), tmp_path / each, "of-large") for each in ("once", "again"))
    assert [path.name for path in once] == ["of-large.svg", "of-large.png"]
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_nothing_is_drawn_without_languages(tmp_path: Path) -> None:
    made = evaluation(dimensions=(64,), precisions=("float32",))
    clustering = Evaluation(made.models, made.select(task="Groups"))
    assert draw_languages(summarize(clustering, "large"), tmp_path) == [] and not list(tmp_path.iterdir())
