"""Text of two classes: its own label's text against the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from babel import Locale

from training.data.building.formats.format import Row
from training.data.building.formats.two_way import TWO_WAY

Refuses = Callable[..., AbstractContextManager[None]]
TEXTS = {0: "a language", 1: "a territory"}


def test_own_label_against_the_other(build: Callable[..., Any]) -> None:
    locale = Locale("hi")
    languages, territories = sorted(locale.languages.values()), sorted(locale.territories.values())
    data = {"text": languages + territories, "label": [0] * len(languages) + [1] * len(territories)}
    rows, dropped = build("two_way", data, label_texts=TEXTS)
    assert [row.query for row in rows] == data["text"]
    assert {row[1:] for row in rows[: len(languages)]} == {("a language", ("a territory",), None)}
    assert {row[1:] for row in rows[len(languages) :]} == {("a territory", ("a language",), None)}
    assert dropped == {}


def test_what_is_dropped_is_counted(build: Callable[..., Any]) -> None:
    data = {"text": ["a", "b", "c", "d", "e"], "label": [1, -1, None, 2, 0], "lang": list("vwxyz")}
    rows, dropped = build("two_way", data, label_texts={**TEXTS, 2: None})
    assert rows == [Row("a", TEXTS[1], (TEXTS[0],), "v"), Row("e", TEXTS[0], (TEXTS[1],), "z")]
    assert dropped == {"label is -1": 1, "label is missing": 1, "label is 2": 1}


def test_several_labels_may_share_a_text(build: Callable[..., Any]) -> None:
    rows, _ = build(
        "two_way", {"text": ["a", "b"], "label": [1, 5]}, label_texts={1: "bad", 2: "bad", 4: "good", 5: "good"}
    )
    assert [row.passage for row in rows] == ["bad", "good"]


def test_unknown_label(build: Callable[..., Any], refuses: Refuses) -> None:
    with refuses("source 'some'", "row 1,", "'label'", "unknown label 2", "'label_texts'"):
        build("two_way", {"text": ["a", "b"], "label": [1, 2]}, label_texts=TEXTS)


@pytest.mark.parametrize(
    "texts",
    [{}, {0: "a"}, {0: "a", 1: "a"}, {0: "a", 1: "b", 2: "c"}, {0: "a", 1: 2}, {0: "a", 1: " "}, {0: "Yes", 1: "yes."}],
)
def test_label_texts_that_are_not_two(texts: Any) -> None:
    assert not TWO_WAY.keys["label_texts"].fits(texts)
    assert TWO_WAY.keys["label_texts"].fits({**TEXTS, -1: None})
