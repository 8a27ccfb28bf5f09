"""Markdown read back: what a reader of the page gets to see."""

from __future__ import annotations

from huggingface_hub import RepoCard
from markdown_it import MarkdownIt

__all__ = ["HOSTILE", "parse", "shown", "structure"]

# Texts that would end a cell, a header or a block of code, become markup, or be taken for something else than a text.
HOSTILE = [
    "a | b",
    "\\| pipe \\",
    "`code` and ``more``",
    "```",
    "<script>alert(1)</script>",
    "</details>",
    "<!-- never closed",
    "&lt;b&gt; &amp; &#124;",
    "[x](javascript:alert(1))",
    "[x]: https://example.org",
    "*a* _b_ **c** __d__ ~~e~~",
    "snake_case_name",
    "$$x$$ and \\(y\\)",
    "# head",
    "---",
    "two\nlines\r\n---\r\n",
    "tab\there",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "no",
    "null",
    "~",
    "1e3",
    "2026-11-26",
    "key: value",
    "!!python/object x",
    "quote\" and ' and \\n",
    "$(echo) `id` ; rm",
    "\u202edesrever",
    "nul\x00 and bell\x07",
    "line\u2028separator",
    "日本語 हिन्दी עברית",
]


def parse(text):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def _flat(tokens):
    for token in tokens:
        yield token
        yield from _flat(token.children or ())


def shown(tokens):
    """The text of inline tokens."""
    return "".join(token.content for token in _flat(tokens) if token.type in ("text", "code_inline"))


def structure(card):
    """All of a page but its words: blocks, tables, links with their targets, elements of HTML, languages of code."""
    found = []
    for token in _flat(parse(RepoCard(card).text)):
        if token.type in ("text", "inline", "softbreak"):
            continue
        # Inline code is an element where its text does not fit between backticks.
        if token.type == "code_inline" or token.content in ("<code>", "</code>"):
            continue
        told = token.info or str(token.attrs.get("href") or token.attrs.get("src") or "")
        found.append((token.type, told or (token.content if "html" in token.type else token.tag)))
    return found
