"""Raw rows: what can be loaded, which columns can be named, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import pytest

from training.data.building.raw import RawRows, load_raw

Refuses = Callable[..., AbstractContextManager[None]]
WHERE = "build.yaml: source 'some'"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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
    with refuses(WHERE, "row 0,", "'a'", "no text"):
        texts([{"a": value}], "a")


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder", "saved", "saved splits"])
def test_what_can_be_loaded(tmp_path: Path, kind: str) -> None:
    data = datasets.Dataset.from_dict({"a": ["日本", 'b, "c"'], "n": [1, 2]})
    folder = tmp_path / "raw"
    folder.mkdir()
    options = {"split": "train"}
    if kind == "saved":
        data.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(folder)
    else:
        write = {"json": data.to_json, "csv": data.to_csv}.get(kind, data.to_parquet)
        write(folder / f"part.{'parquet' if kind == 'folder' else kind}")
    if kind in ("json", "csv", "parquet"):
        loaded = load_raw(WHERE, kind, tmp_path, data_files="raw/part.*", **options)
        absolute = load_raw(WHERE, kind, Path("elsewhere"), data_files=[str(folder / f"part.{kind}")], **options)
        assert absolute.to_list() == loaded.to_list()
    else:
        loaded = load_raw(WHERE, "raw", tmp_path, **options)
    assert loaded.to_list() == data.to_list()


def test_load_options_and_splits_arrive(tmp_path: Path) -> None:
    (tmp_path / "raw.tsv").write_text("a\tb\nx\ty\nv\tw\n", encoding="utf-8")
    loaded = load_raw(WHERE, "csv", tmp_path, data_files="raw.tsv", sep="\t", split="train[:1]")
    assert loaded.to_list() == [{"a": "x", "b": "y"}]


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("json", {"data_files": "none.jsonl"}),
        ("json", {"data_files": "bad.jsonl"}),
        ("json", {"data_files": "good.jsonl", "split": "test"}),
        ("json", {"data_files": "good.jsonl", "nonsense": 1}),
        ("some/set-that-is-nowhere", {}),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, refuses: Refuses, dataset: str, options: dict[str, Any]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": "x"}\n{"a": \n')
    (tmp_path / "good.jsonl").write_text('{"a": "x"}\n')
    with refuses(WHERE, "cannot load", repr(dataset), "check"):
        load_raw(WHERE, dataset, tmp_path, **{"split": "train", **options})


def test_files_that_are_not_named(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(WHERE, "'csv'", "'data_files'"):
        load_raw(WHERE, "csv", tmp_path, split="train")


def test_saved_set_without_the_split(tmp_path: Path, refuses: Refuses) -> None:
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"a": ["x"]})).save_to_disk(tmp_path / "raw")
    with refuses(WHERE, "'train'", "it has test"):
        load_raw(WHERE, "raw", tmp_path, split="train")
