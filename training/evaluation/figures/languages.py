"""Score of every language on one page: a grid of coloured cells, script by script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation.figures.style import new_figure, save, shortened
from training.evaluation.summary import GroupScore, Summary

_COLUMNS = 16
# Inches; cells have one size in all figures.
_CELL_WIDTH, _CELL_HEIGHT = 0.62, 0.42
_MARGIN, _TITLE, _SCALE = 0.1, 0.5, 0.68
# From yellow (low) to dark blue (high): the order is the same in grey and for colour-blind readers.
_COLOUR_MAP = "cividis_r"


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: a language, or (without a score) the name of the script that begins here."""

    row: int
    column: int
    text: str
    score: float | None
    name: str = ""


def lay_out(languages: Sequence[GroupScore], columns: int = _COLUMNS) -> list[Cell]:
    """Place scripts by their number of languages, languages by score, the lowest first.

    A script that fits into a row with its name is not split. A larger one has its own rows, with the name alone in the
    first column.
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
    """Write ``name.svg`` and ``name.png``; nothing if no score has a language."""
    return save(languages_figure(summary) if summary.languages else None, folder, name)


def languages_figure(summary: Summary) -> Any:
    """Return the figure: a cell per language with its score, the lowest ten framed."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    cells = lay_out(summary.languages)
    rows = max(cell.row for cell in cells) + 1
    columns = max(max(cell.column for cell in cells) + 1, 8)
    width, height = columns * _CELL_WIDTH + 2 * _MARGIN, rows * _CELL_HEIGHT + _TITLE + _SCALE
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    inside = 1 - 2 * _MARGIN / width
    axes = figure.add_axes((_MARGIN / width, _SCALE / height, inside, rows * _CELL_HEIGHT / height))
    lowest, highest = summary.languages[0].macro, summary.languages[-1].macro
    colours = ScalarMappable(Normalize(100 * lowest, 100 * highest), colormaps[_COLOUR_MAP])
    worst = {group.name for group in summary.worst} if len(summary.languages) > len(summary.worst) else set()
    for cell in cells:
        middle, score = cell.column + 0.5, cell.score
        if score is None:
            axes.text(middle, cell.row + 0.5, cell.text, ha="center", va="center", fontsize=9, fontweight="bold")
            continue
        colour = colours.to_rgba(100 * score)
        edge = {"edgecolor": "black", "linewidth": 2.2, "zorder": 3} if cell.name in worst else {"edgecolor": "white"}
        axes.add_patch(Rectangle((cell.column + 0.05, cell.row + 0.05), 0.9, 0.9, facecolor=colour, **edge))
        # Relative luminance as in ITU-R BT.709.
        ink = "white" if 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] < 0.45 else "black"
        for text, down in ((cell.text, 0.32), (f"{100 * score:.1f}", 0.7)):
            axes.text(middle, cell.row + down, text, ha="center", va="center", fontsize=8, color=ink, zorder=4)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_axis_off()
    framed = f"; the {len(worst)} lowest framed" if worst else ""
    title = f"{shortened(summary.model, 56)}\nScore (%) of {len(summary.languages)} languages by script{framed}"
    axes.set_title(title, fontsize=10, loc="left")
    if highest > lowest:
        scale = figure.add_axes((_MARGIN / width, 0.48 / height, min(4 / width, inside), 0.12 / height))
        figure.colorbar(colours, cax=scale, orientation="horizontal", label="Mean score over tasks (%)")
    return figure
