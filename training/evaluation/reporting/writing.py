"""Tables and figures as a page that works from a file, and as Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from training.evaluation.reporting.tables import Cell, Table

_STYLE = """
body { font-family: sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin-bottom: 2em }
td, th { border: 1px solid #999; padding: 2px 8px; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
th button { all: unset; cursor: pointer; font-weight: bold }
th button:focus-visible { outline: 2px solid }
svg { max-width: 100%; height: auto }
"""
# Sorts by the column that was clicked, the other way round when clicked again; unknown cells stay at the end.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => a === "" ? 1 : b === "" ? -1
      : (up ? 1 : -1) * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    const rows = [...table.tBodies[0].rows].sort((a, b) => compare(value(a), value(b)));
    table.tBodies[0].append(...rows);
  }));
}
"""


def as_html(title: str, tables: Sequence[Table], figures: Sequence[Path]) -> str:
    """One page without anything from elsewhere: sortable tables, and the figures inside it.

    Args:
        title: Its title.
        tables: In order.
        figures: SVG files.
    """
    drawn = [_svg(path) for path in figures]
    parts = [f"<h1>{html.escape(title)}</h1>", *drawn, *map(_html_table, tables)]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + (f"\n<script>{_SCRIPT}</script>\n</body></html>\n")
    )


def as_markdown(title: str, tables: Sequence[Table], figures: Sequence[Path]) -> str:
    """The same as Markdown.

    Args:
        title: Its title.
        tables: In order.
        figures: Image files that lie beside it.
    """
    parts = [f"# {title}", *(f"![{path.stem}]({path.name})" for path in figures), *map(_markdown_table, tables)]
    return "\n\n".join(parts) + "\n"


def as_text(table: Table) -> str:
    """A table for a terminal, words to the left and numbers to the right."""
    lines = [table.head, *(tuple(map(_shown, row)) for row in table.rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.head))]
    numbers = [any(isinstance(row[place], int | float) for row in table.rows) for place in range(len(table.head))]
    padded = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, "", *padded])


def _svg(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in table.head)
    rows = "\n".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    )


def _html_cell(cell: Cell) -> str:
    value = "" if cell is None else html.escape(str(cell))
    kind = ' class="number"' if isinstance(cell, int | float) else ""
    return f'<td{kind} data-value="{value}">{html.escape(_shown(cell))}</td>'


def _markdown_table(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *([_shown(cell) for cell in row] for row in table.rows)]
    escaped = (" | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) for line in lines)
    return f"## {table.title}\n\n" + "\n".join(f"| {line} |" for line in escaped)


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:.1f}"
    return f"{cell:,}" if isinstance(cell, int) else cell
