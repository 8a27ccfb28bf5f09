"""Text from data inside Markdown: shown as it is, and never markup.

Names, instructions, licences and languages come from manifests and file names. A card that holds them
has the same tables, links and code whatever they are.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata

__all__ = [
    "Markdown",
    "cell",
    "code",
    "link",
    "one_line",
    "plain",
    "python_string",
    "setting",
    "shell_json",
    "shell_word",
]

# Marks that turn the direction of what follows, byte order marks, and tags that no reader sees.
_INVISIBLE = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
# An underscore inside a word begins no emphasis.
_MARKUP = re.compile(r"[`*~|$\[\]]|(?<![^\W_])_|_(?![^\W_])")
_REPOSITORY = re.compile(r"[^\W_][\w.-]*/[^\W_][\w.-]*", re.ASCII)
_ENTITIES = {"&": "&amp;", "<": "&lt;", "\\": "&#92;"}


class Markdown(str):
    """Text that is Markdown already: tables and paragraphs take it as it is."""


def one_line(text: object) -> str:
    """A text on one line, without control characters and marks of direction."""
    visible = _INVISIBLE.sub("", str(text))
    line = " ".join(visible.split())
    return "".join("\ufffd" if unicodedata.category(sign) in ("Cc", "Cs") else sign for sign in line)


def plain(text: object) -> Markdown:
    r"""A text as Markdown that shows just that text.

    Example:
        >>> plain("a | <b>b</b>")
        'a \\| &lt;b>b&lt;/b>'
    """
    if isinstance(text, Markdown):
        return text
    # A backslash is an entity, for two of them before a parenthesis begin a formula on the Hub.
    escaped = "".join(_ENTITIES.get(sign, sign) for sign in one_line(text))
    return Markdown(_MARKUP.sub(lambda found: "\\" + found[0], escaped))


def code(text: object) -> Markdown:
    """A text as inline code, in a paragraph or a cell of a table."""
    line = one_line(text)
    if line and not set(line) & set("`|"):
        return Markdown(f"`{line}`")
    # Inside the element all ASCII punctuation is written as numbers: no parser sees a sign of its own in it.
    numbered = re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", line)
    return Markdown(f"<code>{numbered or ' '}</code>")


def link(repository: str, kind: str = "") -> Markdown:
    """A repository of the Hub as a link; as code what cannot be the name of one.

    Args:
        repository: ``ORGANISATION/NAME``.
        kind: ``datasets/`` or ``collections/``; nothing for a model.
    """
    if not _REPOSITORY.fullmatch(repository):
        return code(repository)
    return Markdown(f"[{plain(repository)}](https://huggingface.co/{kind}{repository})")


def cell(value: object) -> str:
    """A value as a cell of a table: a dash for None, whole numbers with separators, other text as it is."""
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return plain(value)


def setting(value: object) -> str:
    """A value of a setting as a recipe writes it: ``true``, ``none``, ``1e-05``, ``{"min_lr": 1e-07}``."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def python_string(text: str) -> str:
    r"""A literal of Python that is the text; what cannot be seen is written as an escape.

    Example:
        >>> python_string("Instruct: Find it.\nQuery: ")
        '"Instruct: Find it.\\nQuery: "'
    """
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(sign: str) -> str:
    if sign in '"\\':
        return "\\" + sign
    return sign if sign.isprintable() else ascii(sign)[1:-1]


def shell_word(text: str) -> str:
    """A text as one word of a command line."""
    return shlex.quote(one_line(text))


def shell_json(value: object) -> str:
    """A value as JSON in single quotes, for a command line."""
    written = json.dumps(value, ensure_ascii=False).replace("'", "\\u0027")
    return "'" + "".join(sign if sign.isprintable() else _json_escape(sign) for sign in written) + "'"


def _json_escape(sign: str) -> str:
    return json.dumps(sign, ensure_ascii=True)[1:-1]
