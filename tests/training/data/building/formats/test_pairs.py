"""Pairs and summaries: which way they look, and which are left out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from babel import Locale

from training.data.building.formats.format import Row

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="module")
def translations() -> dict[str, list[str]]:
    """The names of territories in English and Korean, by Unicode CLDR."""
    english, korean = Locale("en").territories, Locale("ko").territories
    codes = sorted(code for code in english if code.isalpha() and code in korean)
    return {"query": [english[code] for code in codes], "passage": [korean[code] for code in codes]}


def test_pairs(build: Callable[..., Any], translations: dict[str, list[str]]) -> None:
    rows, dropped = build("pairs", translations)
    assert [(row.query, row.passage) for row in rows] == list(zip(*translations.values(), strict=True))
    assert len(rows) > 200
    assert ("Japan", "일본") in [row[:2] for row in rows]
    assert {row[2:] for row in rows} == {((), None)}
    assert dropped == {}


def test_both_directions_name_their_own_language(build: Callable[..., Any]) -> None:
    data = {"query": ["Japan"], "passage": ["일본"], "lang": ["eng"], "passage_lang": ["kor"]}
    assert build("pairs", data, both_directions=True)[0] == [
        Row("Japan", "일본", lang="eng"),
        Row("일본", "Japan", lang="kor"),
    ]
    assert build("pairs", data)[0] == [Row("Japan", "일본", lang="eng")]
    del data["passage_lang"]
    assert [row.lang for row in build("pairs", data, both_directions=True)[0]] == ["eng", "eng"]


def test_what_is_dropped_is_counted(build: Callable[..., Any]) -> None:
    data = {
        "query": ["a", None, "", "b", "c", " d", "e"],
        "passage": ["A", "B", "C", None, " \n", "d ", "E"],
        "lang": [None, "x", "x", "x", "x", "x", "y"],
    }
    rows, dropped = build("pairs", data)
    assert rows == [Row("a", "A"), Row("e", "E", lang="y")]
    assert dropped == {
        "query is missing": 1,
        "query is blank": 1,
        "passage is missing": 1,
        "passage is blank": 1,
        "query and passage are identical": 1,
    }


def test_summary_looks_for_its_article(build: Callable[..., Any]) -> None:
    rows, dropped = build("summaries", {"article": ["long", "same"], "summary": ["short", "same"], "lang": ["a", "b"]})
    assert rows == [Row("short", "long", lang="a")]
    assert dropped == {"query and passage are identical": 1}


def test_column_that_is_no_text(build: Callable[..., Any], refuses: Refuses) -> None:
    with refuses("build.yaml: source 'some'", "row 1000,", "'passage'", "7", "not text"):
        build("pairs", {"query": ["q"] * 1001, "passage": [None] * 1000 + [7]})
    with refuses("row 0,", "'lang'", "not text"):
        build("pairs", {"query": ["q"], "passage": ["p"], "lang": [3]})
