"""Cards of models and datasets for the Hub, rendered from templates and plain data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["render_dataset_card"]


def render_dataset_card(facts: Mapping[str, Any]) -> str:
    """Renders the card of a dataset.

    Args:
        facts: What ``dataset_card.md.jinja`` names, as plain data; ``metadata`` is the YAML of the header.

    Raises:
        jinja2.UndefinedError: If a fact is missing.
    """
    return _environment().get_template("dataset_card.md.jinja").render(facts)


def _environment() -> Environment:
    # Markdown, not HTML: what would be markup in a cell is escaped there.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "number": "{:,}".format}
    return environment


def _cell(value: object) -> str:
    """A value as a cell of a Markdown table: one line, and its text no markup; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    text = " ".join(str(value).split())
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(sign, written)
    return text
