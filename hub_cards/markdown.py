"""Escape text from data in Markdown, Python and shell, so that it is shown unchanged and is never markup.

Names, instructions, licences and languages come from manifests and file names; none of them may change the structure of
a card.
"""

from __future__ import annotations

import json
import re
import shlex
import unicodedata

# Marks of direction, byte order marks, and invisible tags.
_INVISIBLE = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
# An underscore inside a word does not begin emphasis.
_MARKUP = re.compile(r"[`*~|$\[\]]|(?<![^\W_])_|_(?![^\W_])")
_REPOSITORY = re.compile(r"[^\W_][\w.-]*/[^\W_][\w.-]*", re.ASCII)
_ENTITIES = {"&": "&amp;", "<": "&lt;", "\\": "&#92;"}


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""


def one_line(text: object) -> str:
    """Return a text on one line, without control characters and marks of direction."""
    visible = _INVISIBLE.sub("", str(text))
    line = " ".join(visible.split())
    return "".join("\ufffd" if unicodedata.category(sign) in ("Cc", "Cs") else sign for sign in line)


def plain(text: object) -> Markdown:
    r"""Return Markdown that shows a text.

    Example:
        >>> plain("a | <b>b</b>")
        'a \\| &lt;b>b&lt;/b>'
    """
    if isinstance(text, Markdown):
        return text
    # Two backslashes before a parenthesis begin a formula on the Hub, so each becomes an entity.
    escaped = "".join(_ENTITIES.get(sign, sign) for sign in one_line(text))
    return Markdown(_MARKUP.sub(lambda found: "\\" + found[0], escaped))


def code(text: object) -> Markdown:
    """Return a text as inline code, for a paragraph or a table cell."""
    line = one_line(text)
    if line and not set(line) & set("`|"):
        return Markdown(f"`{line}`")
    # Inside the element all ASCII punctuation is written as numbers, so that no parser finds markup in it.
    numbered = re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", line)
    return Markdown(f"<code>{numbered or ' '}</code>")


def link(repository: str, kind: str = "") -> Markdown:
    """Return a link to a repository of the Hub; inline code if the text cannot be the name of one.

    Args:
        repository: ``ORGANISATION/NAME``.
        kind: ``datasets/`` or ``collections/``; nothing for a model.
    """
    if not _REPOSITORY.fullmatch(repository):
        return code(repository)
    return Markdown(f"[{plain(repository)}](https://huggingface.co/{kind}{repository})")


def cell(value: object) -> str:
    """Return a value as a table cell: a dash for None, integers with separators, other text escaped."""
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return plain(value)


def setting(value: object) -> str:
    """Return the value of a setting as a recipe writes it: ``true``, ``none``, ``1e-05``, ``{"min_lr": 1e-07}``."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def python_string(text: str) -> str:
    r"""Return a Python literal of a text, with escapes for invisible characters.

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
    """Return a text as one word of a command line."""
    return shlex.quote(one_line(text))


def shell_json(value: object) -> str:
    """Return a value as JSON in single quotes, for a command line."""
    written = json.dumps(value, ensure_ascii=False).replace("'", "\\u0027")
    return "'" + "".join(sign if sign.isprintable() else _json_escape(sign) for sign in written) + "'"


def _json_escape(sign: str) -> str:
    return json.dumps(sign, ensure_ascii=True)[1:-1]
