"""Text from data in Markdown: shown as it is, whatever it is."""

from __future__ import annotations

import ast
import json
import shlex

import pytest
import yaml
from huggingface_hub import CardData, ModelCard

from hub_cards.markdown import cell, code, link, one_line, plain, python_string, setting, shell_json, shell_word
from hub_cards.metadata import header
from tests.hub_cards.markdown_pages import HOSTILE, parse, shown

pytestmark = pytest.mark.filterwarnings("error")


def cells(table):
    """The inline tokens of each cell of a table of one row, and nothing beside it."""
    tokens = parse(table)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
    return [tokens[place + 1] for place, token in enumerate(tokens) if token.type == "td_open"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("write", [plain, cell, code])
def test_a_cell_shows_the_text(text, write):
    found = cells(f"| a | b |\n| --- | --- |\n| {write(text)} | end |\n")
    assert [shown([each]) for each in found] == [one_line(text), "end"]
    allowed = {"text"} if write is not code else {"text", "code_inline", "html_inline"}
    assert {token.type for token in found[0].children} <= allowed
    assert {token.content for token in found[0].children if token.type == "html_inline"} <= {"<code>", "</code>"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_sentence_shows_the_text(text):
    tokens = parse(f"Before {plain(text)} and {code(text)} after.\n")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert shown(tokens) == f"Before {one_line(text)} and {one_line(text)} after."


@pytest.mark.parametrize("text", HOSTILE)
def test_literals_are_the_text(text):
    literal = python_string(text)
    assert ast.literal_eval(literal) == text and "\n" not in literal and literal.isprintable()
    words = shlex.split(f"curl -d {shell_json({'input': text})} {shell_word(text)}")
    assert json.loads(words[2]) == {"input": text} and words[3] == one_line(text)
    assert "\n" not in shell_json({"input": text})


@pytest.mark.parametrize("text", HOSTILE)
def test_the_header_holds_the_text(text):
    written = header(CardData(name=text, tags=[text], nested={"key": text, text: 1}))
    line = one_line(text)
    assert yaml.safe_load(written) == {"name": line, "tags": [line], "nested": {"key": line, line: 1}}
    card = ModelCard(f"---\n{written}---\n\n# Card\n")
    assert card.data.to_dict()["name"] == line and card.text.strip() == "# Card"


@pytest.mark.parametrize("text", ["1e3", "0o17", "12", "-.5", "0x1F", "no", "null", "~"])
def test_what_a_newer_yaml_takes_for_a_number_is_quoted(text):
    assert header(CardData(name=text)) == f"name: '{text}'\n"


def test_numbers_of_the_header_stay_numbers():
    assert yaml.safe_load(header(CardData(value=0.00001, count=3, flag=True))) == {
        "value": 1e-5,
        "count": 3,
        "flag": True,
    }


def test_one_line():
    assert one_line("a\r\n\tb\u2028c\u202e \x00") == "a b c \ufffd"
    # Joiners belong to words of some scripts.
    assert one_line("می\u200cخواهم") == "می\u200cخواهم"
    assert one_line("\ud800") == "\ufffd"


def test_cells():
    assert [cell(None), cell(1234), cell(True), cell("x_y")] == ["–", "1,234", "True", "x_y"]
    # What is Markdown already is not escaped again.
    assert cell(code("a*b")) == "`a*b`" and plain(link("a/b")) == "[a/b](https://huggingface.co/a/b)"


def test_only_what_can_be_a_repository_becomes_a_link():
    assert link("org/set", "datasets/") == "[org/set](https://huggingface.co/datasets/org/set)"
    for name in ("org", "../x", "a/b/c", "a/b)c", "javascript:alert(1)/x", "a/é"):
        assert "](" not in link(name), name


def test_settings():
    values = [None, True, 1e-5, "cosine", {"min_lr": 1e-7}, ["retrieval"]]
    assert list(map(setting, values)) == ["none", "true", "1e-05", "cosine", '{"min_lr": 1e-07}', '["retrieval"]']
