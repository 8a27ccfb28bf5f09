"""Raw rows by role: the parts of columns that are read, what is counted and what is refused."""

from __future__ import annotations

import datasets
import pytest

from tests.training.data.building.test_reader import WHERE, texts
from training.data.building.examples import RawRows
from training.data.building.reader import from_dataset


@pytest.mark.parametrize(
    ("cell", "column", "expected"),
    [
        ({"a": {"text": ["x", "y"], "start": [1, 2]}}, "a.text", "x"),
        ({"a": [{"text": "x"}, {"text": "y"}]}, "a.text", "x"),
        ({"a": {"en": "x", "de": "y"}}, "a.de", "y"),
        ({"a.text": "x", "a": {"text": "y"}}, "a.text", "x"),
        ({"title": "x", "body": "y", "more": "z"}, ["title", "body"], "x\ny"),
        ({"title": "x", "body": {"text": ["y"]}}, ["body.text", "title"], "y\nx"),
    ],
)
def test_columns(cell, column, expected):
    assert texts([cell], column) == [expected]


def test_rows_that_are_missing_or_blank_are_counted():
    data = [{"a": "x", "b": None}, {"a": None, "b": None}, {"a": " ", "b": "y"}, {"a": "", "b": " "}]
    assert texts(data, ["a", "b"]) == ["x", "y"]
    nested = [{"a": {"text": []}}, {"a": None}, {"a": {"text": None}}, {"a": {"text": ["x"]}}]
    assert texts(nested, "a.text") == ["x"]
    # The numbers are those of the raw rows.
    data = from_dataset(datasets.Dataset.from_dict({"a": ["", None] * 1500 + ["x"], "b": range(3001)}))
    columns = {"text": "a", "label": "b"}
    raw = RawRows(data, columns, WHERE, texts=["text"], values=["label"], optional=["lang"])
    assert list(raw) == list(raw) == [(3000, {"text": "x", "label": 3000, "lang": None})]
    assert raw.dropped == {"text is blank": 1500, "text is missing": 1500}


def test_missing_columns_and_other_types_are_refused(refuses):
    for column in ("b", ["a.text", "b"], ""):
        with refuses(WHERE, "no column", "'text'", "'columns'", "the data has a"):
            texts([{"a": {"text": ["x"]}}], column)
    with refuses(WHERE, "row 0,", "'a.text.x'", "without x"):
        texts([{"a": {"text": ["x"]}}], "a.text.x")
    for value in (1, 0.5, True, {"b": "c"}, [1]):
        with refuses(WHERE, "row 0,", "'a'", "not text"):
            texts([{"a": value}], "a")


def test_json_columns_are_decoded_by_the_features(refuses):
    features = datasets.Features({"a": datasets.Json(), "b": [datasets.Json()], "c": {"d": datasets.Json()}})
    data = [{"a": "竹", "b": ["大熊猫"], "c": {"d": "x"}}, {"a": "é", "b": [4], "c": None}]
    dataset = datasets.Dataset.from_list(data, features=features)
    for column, expected in (("a", ["竹", "é"]), ("c.d", ["x"])):
        assert texts(dataset, column) == expected
    with refuses(WHERE, "row 1, column 'b'", "4", "on_bad_row: quarantine"):
        texts(dataset, "b")
    assert texts(dataset, "b", quarantine=True) == ["大熊猫"]
