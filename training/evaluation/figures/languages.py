"""Every language's score on one page: a grid of labelled cells, script by script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation.figures.style import new_figure, save, shortened
from training.evaluation.summary import GroupScore, Summary

_COLUMNS = 16
# All in inches; the title and the scale have room beside the grid, whose cells are of one size however few they are.
_CELL_WIDTH, _CELL_HEIGHT = 0.62, 0.42
_MARGIN, _TITLE, _SCALE = 0.1, 0.5, 0.68


@dataclass(frozen=True)
class Cell:
    """A cell of the grid.

    Attributes:
        row: From the top.
        column: From the left.
        text: Code of the language, or of the script that begins here.
        score: In [0, 1]; None for a script's name.
        name: Language with its script; empty for a script's name.
    """

    row: int
    column: int
    text: str
    score: float | None
    name: str = ""


def lay_out(languages: Sequence[GroupScore], columns: int = _COLUMNS) -> list[Cell]:
    """Places scripts by their number of languages, languages by score, lowest first.

    A script that fits in a row with its name is not parted. A larger one has rows of its own, whose first column holds
    nothing but its name.
    """
    scripts: dict[str, list[GroupScore]] = {}
    for group in languages:
        scripts.setdefault(group.name.partition("-")[2] or "other", []).append(group)
    cells: list[Cell] = []
    row = column = 0
    for script, members in sorted(scripts.items(), key=lambda item: (-len(item[1]), item[0])):
        if column and column + 1 + len(members) > columns:
            row, column = row + 1, 0
        cells.append(Cell(row, column, script, None))
        for group in sorted(members, key=lambda member: member.macro):
            column += 1
            if column == columns:
                row, column = row + 1, 1
            cells.append(Cell(row, column, group.name.partition("-")[0], group.macro, group.name))
        column = columns if len(members) >= columns else column + 1
    return cells


def draw_languages(summary: Summary, folder: Path, name: str = "languages") -> list[Path]:
    """Writes ``name.svg`` and ``.png``: a cell a language with its score, the darker the lower; the worst framed.

    Returns:
        The files; none where no score has a language.

    Raises:
        UserError: If matplotlib is missing.
    """
    return save(languages_figure(summary), folder, name) if summary.languages else []


def languages_figure(summary: Summary) -> Any:
    """The figure of a summary that has languages.

    Raises:
        UserError: If matplotlib is missing.
    """
    cells = lay_out(summary.languages)
    rows = max(cell.row for cell in cells) + 1
    columns = max(max(cell.column for cell in cells) + 1, 8)
    width, height = columns * _CELL_WIDTH + 2 * _MARGIN, rows * _CELL_HEIGHT + _TITLE + _SCALE
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    inside = 1 - 2 * _MARGIN / width
    axes = figure.add_axes((_MARGIN / width, _SCALE / height, inside, rows * _CELL_HEIGHT / height))
    lowest, highest = summary.languages[0].macro, summary.languages[-1].macro
    worst = {group.name for group in summary.worst} if len(summary.languages) > len(summary.worst) else set()
    for cell in cells:
        _draw_cell(axes, cell, _shade(cell.score, lowest, highest), cell.name in worst)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_axis_off()
    framed = f"; the {len(worst)} lowest framed" if worst else ""
    axes.set_title(
        f"{shortened(summary.model, 56)}\nscore (%) of {len(summary.languages)} languages by script{framed}",
        fontsize=10,
        loc="left",
    )
    if highest > lowest:
        scale = figure.add_axes((_MARGIN / width, 0.48 / height, min(4 / width, inside), 0.12 / height))
        _draw_scale(scale, lowest, highest)
    return figure


def _shade(score: float | None, lowest: float, highest: float) -> float:
    """Grey of a cell, 0.3 for the lowest score to 1 for the highest."""
    if score is None or highest <= lowest:
        return 1.0
    return 0.3 + 0.7 * (score - lowest) / (highest - lowest)


def _draw_cell(axes: Any, cell: Cell, grey: float, framed: bool) -> None:
    from matplotlib.patches import Rectangle

    middle = cell.column + 0.5
    if cell.score is None:
        axes.text(middle, cell.row + 0.5, cell.text, ha="center", va="center", fontsize=9, fontweight="bold")
        return
    edge = {"edgecolor": "black", "linewidth": 2.2, "zorder": 3} if framed else {"edgecolor": "0.6", "linewidth": 0.6}
    inset = 0.05
    axes.add_patch(
        Rectangle((cell.column + inset, cell.row + inset), 1 - 2 * inset, 1 - 2 * inset, facecolor=str(grey), **edge)
    )
    ink = "white" if grey < 0.55 else "black"
    axes.text(middle, cell.row + 0.32, cell.text, ha="center", va="center", fontsize=8, color=ink, zorder=4)
    score = f"{100 * cell.score:.1f}"
    axes.text(middle, cell.row + 0.7, score, ha="center", va="center", fontsize=8, color=ink, zorder=4)


def _draw_scale(axes: Any, lowest: float, highest: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shades = LinearSegmentedColormap.from_list("shades", [str(_shade(bound, 0, 1)) for bound in (0, 1)])
    scale = ScalarMappable(Normalize(100 * lowest, 100 * highest), shades)
    axes.figure.colorbar(scale, cax=axes, orientation="horizontal", label="mean score over tasks (%)")
