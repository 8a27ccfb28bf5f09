"""Raw rows: which columns can be named, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import datasets
import pytest

from training.data.building.raw import RawRows

Refuses = Callable[..., AbstractContextManager[None]]
WHERE = "build.yaml: source 'some'"


def texts(data: list[dict[str, Any]], column: Any) -> list[str]:
    raw = RawRows(datasets.Dataset.from_list(data), {"text": column}, WHERE, texts=["text"])
    return [row["text"] for _, row in raw]


@pytest.mark.parametrize(
    ("cell", "column", "expected"),
    [
        ({"a": "x"}, "a", "x"),
        ({"a": {"text": ["x", "y"], "start": [1, 2]}}, "a.text", "x"),
        ({"a": [{"text": "x"}, {"text": "y"}]}, "a.text", "x"),
        ({"a": ["x", "y"]}, "a", "x"),
        ({"a": {"en": "x", "de": "y"}}, "a.de", "y"),
        ({"a.text": "x", "a": {"text": "y"}}, "a.text", "x"),
        ({"title": "x", "body": "y", "more": "z"}, ["title", "body"], "x\ny"),
        ({"title": "x", "body": {"text": ["y"]}}, ["body.text", "title"], "y\nx"),
    ],
)
def test_columns(cell: dict[str, Any], column: Any, expected: str) -> None:
    assert texts([cell], column) == [expected]


def test_joined_texts_leave_out_what_is_missing() -> None:
    data = [{"a": "x", "b": None}, {"a": None, "b": None}, {"a": " ", "b": "y"}, {"a": "", "b": " "}]
    assert texts(data, ["a", "b"]) == ["x", "y"]


def test_nested_values_may_be_missing() -> None:
    data = [{"a": {"text": []}}, {"a": None}, {"a": {"text": None}}, {"a": {"text": ["x"]}}]
    assert texts(data, "a.text") == ["x"]


def test_numbers_are_those_of_the_raw_rows() -> None:
    data = datasets.Dataset.from_dict({"a": ["", None] * 1500 + ["x"], "b": range(3001)})
    raw = RawRows(data, {"text": "a", "label": "b"}, WHERE, texts=["text"], values=["label"], optional=["lang"])
    assert list(raw) == list(raw) == [(3000, {"text": "x", "label": 3000, "lang": None})]
    assert raw.dropped == {"text is blank": 1500, "text is missing": 1500}
    assert len(raw) == 3001


@pytest.mark.parametrize("column", ["b", "a.x", "a.text.x", ["a.text", "b"], ""])
def test_column_that_is_not_there(refuses: Refuses, column: Any) -> None:
    with refuses(WHERE, "no column", "'text'", "'columns'", "the data has a"):
        texts([{"a": {"text": ["x"]}}], column)


@pytest.mark.parametrize("value", [1, 0.5, True, {"b": "c"}, [1]])
def test_column_that_is_no_text(refuses: Refuses, value: Any) -> None:
    with refuses(WHERE, "row 0,", "'a'", "not text"):
        texts([{"a": value}], "a")


def test_json_is_decoded_as_the_features_say(refuses: Refuses) -> None:
    features = datasets.Features({"a": datasets.Json(), "b": [datasets.Json()], "c": {"d": datasets.Json()}})
    data = [{"a": "竹", "b": ["大熊猫"], "c": {"d": "x"}}, {"a": "é", "b": [], "c": None}]
    dataset = datasets.Dataset.from_list(data, features=features)
    for column, expected in (("a", ["竹", "é"]), ("b", ["大熊猫"]), ("c.d", ["x"])):
        raw = RawRows(dataset, {"text": column}, WHERE, texts=["text"])
        assert [row["text"] for _, row in raw] == expected
    wrong = datasets.Dataset.from_list([{"a": "竹", "b": [4], "c": None}], features=features)
    with refuses(WHERE, "row 0, column 'b'", "4", "on_bad_row: quarantine"):
        list(RawRows(wrong, {"text": "b"}, WHERE, texts=["text"]))


def test_quarantined_rows_are_counted() -> None:
    features = datasets.Features({"a": datasets.Json()})
    dataset = datasets.Dataset.from_list([{"a": "x"}, {"a": 1}, {"a": {"b": "x"}}, {"a": "y"}], features=features)
    raw = RawRows(dataset, {"text": "a"}, WHERE, texts=["text"], quarantine=True)
    assert [(number, row["text"]) for number, row in raw] == [(0, "x"), (3, "y")]
    assert raw.dropped == {"text is not text": 2}
