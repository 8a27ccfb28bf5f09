"""Raw rows: texts are read as they are in the files, and what cannot be loaded or read is reported in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data.building.formats import duplicate_groups
from training.data.building.raw_rows import RawRows, load_raw

Refuses = Callable[..., AbstractContextManager[None]]
WHERE = "build.yaml: source 'some'"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """``load(dataset, data_files=…, …)`` with paths relative to ``tmp_path``."""

    def load(dataset: str, split: str = "train", **options: Any) -> Any:
        return load_raw(WHERE, dataset, tmp_path, split=split, **options)

    return load


@pytest.fixture
def load_json(tmp_path: Path, load: Callable[..., Any]) -> Callable[..., Any]:
    """Loads a JSON file of the given lines."""

    def load_json(*lines: Any, **options: Any) -> Any:
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        return load("json", data_files="a.jsonl", **options)

    return load_json


def rows(loaded: Any, *columns: str) -> list[tuple[Any, ...]]:
    raw = RawRows(loaded, {name: name for name in columns}, WHERE, values=columns)
    return [tuple(row.values()) for _, row in raw]


def texts(loaded: Any, column: Any, **options: Any) -> list[str]:
    if isinstance(loaded, list):
        loaded = datasets.Dataset.from_list(loaded)
    return [row["text"] for _, row in RawRows(loaded, {"text": column}, WHERE, texts=["text"], **options)]


# Loading


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder", "saved", "saved splits"])
def test_what_can_be_loaded(tmp_path: Path, load: Callable[..., Any], kind: str) -> None:
    data = datasets.Dataset.from_dict({"a": ["日本", 'b, "c"'], "n": [1, 2]})
    folder = tmp_path / "raw"
    folder.mkdir()
    if kind == "saved":
        data.save_to_disk(folder)
    elif kind == "saved splits":
        datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(folder)
    else:
        write = {"json": data.to_json, "csv": data.to_csv}.get(kind, data.to_parquet)
        write(folder / f"part.{'parquet' if kind == 'folder' else kind}")
    if kind in ("json", "csv", "parquet"):
        loaded = load(kind, data_files="raw/part.*")
        absolute = load_raw(WHERE, kind, Path("elsewhere"), split="train", data_files=[str(folder / f"part.{kind}")])
        assert rows(absolute, "a", "n") == rows(loaded, "a", "n")
    else:
        loaded = load("raw")
    numbers = ["1", "2"] if kind == "csv" else [1, 2]
    assert rows(loaded, "n", "a") == list(zip(numbers, data["a"], strict=True))


def test_load_options_and_splits(tmp_path: Path, load: Callable[..., Any]) -> None:
    (tmp_path / "raw.tsv").write_text("a\tb\nx\ty\nv\tw\n", encoding="utf-8")
    assert load("csv", "train[:1]", data_files="raw.tsv", sep="\t").to_list() == [{"a": "x", "b": "y"}]
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"a": "x{number}"}}\n{{"a": "y{number}"}}\n')
    assert texts(load("json", "train[1:3]", data_files="[01].jsonl"), "a") == ["y0", "x1"]


@pytest.mark.parametrize(
    ("dataset", "options", "parts"),
    [
        ("json", {"data_files": "good.jsonl", "split": "test"}, ("cannot load", "'json'", "check")),
        ("json", {"data_files": "good.jsonl", "nonsense": 1}, ("cannot load", "'json'", "check")),
        ("some/set-that-is-nowhere", {}, ("cannot load", "some/set-that-is-nowhere", "check")),
        ("csv", {}, ("'csv'", "'data_files'")),
        ("saved", {}, ("'train'", "it has test")),
        ("script", {}, ("scripts are no longer supported", "parquet")),
        *(
            (kind, {"data_files": files}, ("data_files", "no file", "check"))
            for kind in ("json", "csv")
            for files in ("none.jsonl", "raw/*.jsonl", ["good.jsonl", "none*.jsonl"])
        ),
        *((kind, {"data_files": "empty"}, ("no rows",)) for kind in ("json", "csv", "text")),
        ("csv", {"data_files": "header"}, ("no rows",)),
        *((kind, {"data_files": "bytes"}, ("cannot load", "utf-8")) for kind in ("json", "csv", "text")),
    ],
)
def test_what_cannot_be_loaded(
    tmp_path: Path, load: Callable[..., Any], refuses: Refuses, dataset: str, options: dict, parts: tuple[str, ...]
) -> None:
    (tmp_path / "good.jsonl").write_text('{"a": "x"}\n')
    (tmp_path / "empty").write_text("")
    (tmp_path / "header").write_text("a,b\n")
    (tmp_path / "bytes").write_bytes(b'a,b\n"\xff",x\n')
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"a": ["x"]})).save_to_disk(tmp_path / "saved")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit\n")
    with refuses(WHERE, *parts):
        load(dataset, **options)


# JSON


def test_a_number_changes_no_other_text(tmp_path: Path, load_json: Callable[..., Any], refuses: Refuses) -> None:
    loaded = load_json({"query": "大熊猫", "pos": "竹"}, {"query": 42, "pos": ["x"]})
    assert texts(loaded, "pos") == ["竹", "x"]
    assert texts(loaded, "query", quarantine=True) == ["大熊猫"]
    with refuses(WHERE, str(tmp_path / "a.jsonl"), "line 2", "'query'", "42", "int"):
        texts(loaded, "query")


def test_texts_that_look_like_something_else(load_json: Callable[..., Any]) -> None:
    values = ["42", "007", "0.50", "null", "true", "NaN", '"quoted"', '{"a": 1}', "2020-01-01", "\u2028", "NA"]
    lines = [{"a": text, "n": number if number % 2 else str(number)} for number, text in enumerate(values)]
    assert rows(load_json(*lines), "a", "n") == [tuple(line.values()) for line in lines]
    assert texts(load_json({"a": "2020-01-01"}), "a") == ["2020-01-01"]


def test_a_number_in_the_last_line_is_found(load_json: Callable[..., Any], refuses: Refuses) -> None:
    loaded = load_json(*({"a": "text " * 10} for _ in range(3000)), {"a": 42.5}, chunksize=1 << 14)
    with refuses("line 3001", "42.5"):
        texts(loaded, "a")


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ('[{"a": "x", "n": 1}, {"a": "y"}]', {}),
        ('[\n {"a": "x"},\n {"a": "y"}\n]\n', {}),
        ('\ufeff{"a": "x"}\n\n{"a": "y"}', {}),
        ('{"a": "x"}\r\n{"b": [1, "z"]}\r\n{"a": "y"}\r\n', {}),
        ('{\n"version": 2, "data": [\n{"a": "x"}, {"a": "y"}]}', {"field": "data"}),
    ],
)
def test_layouts_of_json(tmp_path: Path, load: Callable[..., Any], content: str, options: dict[str, str]) -> None:
    (tmp_path / "0.json").write_text("")
    (tmp_path / "1.json").write_bytes(content.encode())
    assert texts(load("json", data_files="*.json", **options), "a") == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "column", "fault"),
    [
        ('{"a": "x"}\n{"a": \n', "a", "line 2: not valid JSON"),
        ('{"a": "x"}\n["x"]\n', "a", "line 2 is"),
        ('{"a": "x"}\n{"a": "y", "a": "z"}\n', "a", "key 'a' occurs twice"),
        ('{"a": "x"}\n{"a": "\\ud83d"}\n', "a", "line 2, column 'a'"),
        ('{"a": "x"}\n' + '{"a": ' * 100_000 + "\n", "a", "line 2: not valid JSON"),
        ('["x"]', "a", "item 1 is 'x'"),
        ('{"b": "x"}', "a", "no column 'a'"),
        ('{"a": {"text": "x"}}', "a", "dict"),
        ('{"a": {"text": ["x", "y"]}}\n{"a": null}\n{"a": "z"}\n', "a.text", "without text"),
    ],
)
def test_faulty_json(
    tmp_path: Path, load: Callable[..., Any], refuses: Refuses, content: str, column: str, fault: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with refuses(fault):
        texts(load("json", data_files="a.jsonl"), column)


def test_a_number_in_a_group(load_json: Callable[..., Any], refuses: Refuses) -> None:
    loaded = load_json({"g": ["大熊猫", "竹"]}, {"g": ["x", 3]})
    options = {"values": ["group"], "optional": ["lang"]}
    with refuses("a.jsonl: line 2", "'g'", "['x', 3]", "not a list of texts"):
        list(duplicate_groups(RawRows(loaded, {"group": "g"}, WHERE, **options), both_directions=False))
    raw = RawRows(loaded, {"group": "g"}, WHERE, **options, quarantine=True)
    assert [row[:2] for row in duplicate_groups(raw, both_directions=False)] == [("大熊猫", "竹")]
    assert raw.dropped == {"group is not text": 1}


# CSV and parquet


def test_csv_texts_are_those_of_the_file(tmp_path: Path, load: Callable[..., Any]) -> None:
    values = ["NA", "None", "null", "00001", "1e5", "0.50", "True", " x ", "2020-01-01", "", "1", *["filler"] * 10_000]
    values += ["00001", "0.50", "nan"]
    lines = [f"{text},{number},{number / 2:.2f}" for number, text in enumerate(values)]
    for name, mark in (("a.csv", ","), ("b.tsv", "\t")):
        (tmp_path / name).write_text("\n".join(["a,n,s", *lines, ""]).replace(",", mark), encoding="utf-8")
        loaded = load("csv", data_files=name, sep=mark)
        assert loaded["a"][:] == values
        assert texts(loaded, "a") == [text for text in values if text.strip()]
        assert loaded["s"][:] == [f"{number / 2:.2f}" for number in range(len(values))]


def test_missing_fields_of_a_csv_file(tmp_path: Path, load: Callable[..., Any]) -> None:
    (tmp_path / "a.csv").write_text("a,b\nx,\n,y\nv,w\n")
    raw = RawRows(load("csv", data_files="a.csv"), {"text": "a", "label": "b"}, WHERE, texts=["text"], values=["label"])
    assert [row for _, row in raw] == [{"text": "v", "label": "w"}]
    assert raw.dropped == {"text is blank": 1, "label is missing": 1}
    # Unless the user asks for something else.
    assert load("csv", data_files="a.csv", na_values=["w"])["b"][:] == ["", "y", None]
    (tmp_path / "index.csv").write_text(",a\n0,x\n1,y\n")
    loaded = load("csv", data_files="index.csv")
    assert texts(loaded, "a") == ["x", "y"] and len(loaded.column_names) == 2


@pytest.mark.parametrize("lines", ["1,2,3\n4,5\n", "4,5\n1,2,3\n", "1,2,3,4\n", "x,y,z\n" * 3])
def test_a_csv_row_of_too_many_fields(tmp_path: Path, load: Callable[..., Any], refuses: Refuses, lines: str) -> None:
    (tmp_path / "a.csv").write_text(f"a,b\n{lines}")
    with refuses(WHERE, "cannot load"):
        load("csv", data_files="a.csv")


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_types_of_parquet(tmp_path: Path, load: Callable[..., Any], kind: pa.DataType) -> None:
    pq.write_table(pa.table({"a": pa.array(["x", None, "y"]).cast(kind)}), tmp_path / "a.parquet")
    assert texts(load("parquet", data_files="a.parquet"), "a") == ["x", "y"]


# Columns


@pytest.mark.parametrize(
    ("cell", "column", "expected"),
    [
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


def test_missing_parts_are_left_out() -> None:
    data = [{"a": "x", "b": None}, {"a": None, "b": None}, {"a": " ", "b": "y"}, {"a": "", "b": " "}]
    assert texts(data, ["a", "b"]) == ["x", "y"]
    nested = [{"a": {"text": []}}, {"a": None}, {"a": {"text": None}}, {"a": {"text": ["x"]}}]
    assert texts(nested, "a.text") == ["x"]


def test_numbers_are_those_of_the_raw_rows() -> None:
    data = datasets.Dataset.from_dict({"a": ["", None] * 1500 + ["x"], "b": range(3001)})
    raw = RawRows(data, {"text": "a", "label": "b"}, WHERE, texts=["text"], values=["label"], optional=["lang"])
    assert list(raw) == list(raw) == [(3000, {"text": "x", "label": 3000, "lang": None})]
    assert raw.dropped == {"text is blank": 1500, "text is missing": 1500}
    assert len(raw) == 3001


@pytest.mark.parametrize("column", ["b", "a.x", "a.text.x", ["a.text", "b"], ""])
def test_a_missing_column_is_refused(refuses: Refuses, column: Any) -> None:
    with refuses(WHERE, "no column", "'text'", "'columns'", "the data has a"):
        texts([{"a": {"text": ["x"]}}], column)


@pytest.mark.parametrize("value", [1, 0.5, True, {"b": "c"}, [1]])
def test_a_column_that_is_not_text_is_refused(refuses: Refuses, value: Any) -> None:
    with refuses(WHERE, "row 0,", "'a'", "not text"):
        texts([{"a": value}], "a")


def test_json_columns_are_decoded_by_the_features(refuses: Refuses) -> None:
    features = datasets.Features({"a": datasets.Json(), "b": [datasets.Json()], "c": {"d": datasets.Json()}})
    data = [{"a": "竹", "b": ["大熊猫"], "c": {"d": "x"}}, {"a": "é", "b": [], "c": None}]
    dataset = datasets.Dataset.from_list(data, features=features)
    for column, expected in (("a", ["竹", "é"]), ("b", ["大熊猫"]), ("c.d", ["x"])):
        assert texts(dataset, column) == expected
    wrong = datasets.Dataset.from_list([{"a": "竹", "b": [4], "c": None}, *data[:1]], features=features)
    with refuses(WHERE, "row 0, column 'b'", "4", "on_bad_row: quarantine"):
        texts(wrong, "b")
    raw = RawRows(wrong, {"text": "b"}, WHERE, texts=["text"], quarantine=True)
    assert [(number, row["text"]) for number, row in raw] == [(1, "大熊猫")]
    assert raw.dropped == {"text is not text": 1}
