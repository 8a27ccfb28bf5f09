"""Cards of models, datasets and checkpoints for the Hub, rendered from templates and plain data.

A template names the facts that it needs as plain data, ``metadata`` being the YAML of the header; a missing fact is a
``jinja2.UndefinedError``. The templates escape what comes from data by the filters of :mod:`hub_cards.markdown`:
``plain`` for text, ``code`` for inline code, ``cell`` for cells of tables, ``string`` for literals in Python code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hub_cards.markdown import cell, code, link, plain, python_string, setting


def render_model_card(facts: Mapping[str, Any]) -> str:
    """Render the card of a model."""
    return _render("model_card.md.jinja", facts)


def render_checkpoint_card(facts: Mapping[str, Any]) -> str:
    """Render the card of an intermediate checkpoint."""
    return _render("checkpoint_card.md.jinja", facts)


def render_checkpoints_card(facts: Mapping[str, Any]) -> str:
    """Render the list of a repository's checkpoints."""
    return _render("checkpoints_card.md.jinja", facts)


def render_dataset_card(facts: Mapping[str, Any]) -> str:
    """Render the card of a dataset."""
    return _render("dataset_card.md.jinja", facts)


def _render(template: str, facts: Mapping[str, Any]) -> str:
    text = _environment().get_template(template).render(facts)
    # Tables and folds end with an empty line of their own; code keeps all of its lines.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"\n{3,}", "\n\n", part) for part in parts)


def _environment() -> Environment:
    # Markdown, not HTML: what would be markup is escaped where it stands.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": cell,
        "code": code,
        "line": lambda text: " ".join(text.split()),
        "link": link,
        "number": "{:,}".format,
        "plain": plain,
        "setting": setting,
        "string": python_string,
    }
    return environment
