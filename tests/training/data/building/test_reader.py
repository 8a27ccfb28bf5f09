"""Raw rows: texts are read as they are in the files, and what cannot be loaded or read is reported in one line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from training.data.building.examples import RawRows
from training.data.building.formats import FORMATS
from training.data.building.reader import RawData, from_dataset, load_raw

WHERE = "build.yaml: source 'some'"
GROUPS = {"values": ["group"], "optional": ["lang"]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tmp_path):
    """Paths are relative to the test's folder; lines are of the file a.jsonl."""

    def load(dataset="json", split="train", lines=(), **options):
        if lines:
            options["data_files"] = "a.jsonl"
            (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return load_raw(WHERE, dataset, tmp_path, split=split, **options)

    return load


def rows(loaded, *columns):
    return [tuple(row[column] for column in columns) for _, row in loaded.read([*columns])]


def texts(loaded, column, **options):
    if not isinstance(loaded, RawData):
        loaded = from_dataset(loaded if isinstance(loaded, datasets.Dataset) else datasets.Dataset.from_list(loaded))
    return [row["text"] for _, row in RawRows(loaded, {"text": column}, WHERE, texts=["text"], **options)]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "folder", "saved", "saved splits"])
def test_what_can_be_loaded(tmp_path, load, kind):
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


def test_load_options_and_splits(tmp_path, load):
    (tmp_path / "raw.tsv").write_text("a\tb\nx\ty\nv\tw\n", encoding="utf-8")
    assert rows(load("csv", "train[:1]", data_files="raw.tsv", sep="\t"), "a", "b") == [("x", "y")]
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"a": "x{number}"}}\n{{"a": "y{number}"}}\n')
    assert texts(load("json", "train[1:3]", data_files="[01].jsonl"), "a") == ["y0", "x1"]


@pytest.mark.parametrize(
    ("dataset", "options", "parts"),
    [
        ("json", {"data_files": "good.jsonl", "split": "test"}, ("cannot load", "'json'", "splits train")),
        ("some/set-that-is-nowhere", {}, ("cannot load", "some/set-that-is-nowhere", "check")),
        ("csv", {}, ("'csv'", "'data_files'")),
        ("saved", {}, ("'train'", "test")),
        ("script", {}, ("scripts are no longer supported",)),
        *(("csv", {"data_files": files}, ("no file", "check")) for files in ("raw/*.csv", ["good.jsonl", "none*"])),
        ("json", {"data_files": "empty"}, ("no rows",)),
        *(("csv", {"data_files": file}, ("cannot load", "check")) for file in ("empty", "header")),
        ("csv", {"data_files": "wide"}, ("cannot load",)),
        *((kind, {"data_files": "bytes"}, ("cannot load", "utf-8")) for kind in ("json", "csv", "text")),
    ],
)
def test_what_cannot_be_loaded(tmp_path, load, refuses, dataset, options, parts):
    (tmp_path / "good.jsonl").write_text('{"a": "x"}\n')
    (tmp_path / "empty").write_text("")
    (tmp_path / "header").write_text("a,b\n")
    (tmp_path / "wide").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "bytes").write_bytes(b'a,b\n"\xff",x\n')
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"a": ["x"]})).save_to_disk(tmp_path / "saved")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit\n")
    with refuses(WHERE, *parts):
        load(dataset, **options)


def test_a_number_changes_no_other_text(tmp_path, load, refuses):
    loaded = load(lines=[{"query": "007", "pos": "2020-01-01"}] * 3 + [{"query": 42, "pos": ["x"]}])
    assert texts(loaded, "pos") == ["2020-01-01"] * 3 + ["x"]
    assert texts(loaded, "query", quarantine=True) == ["007"] * 3
    with refuses(WHERE, str(tmp_path / "a.jsonl"), "line 4", "'query'", "42"):
        texts(loaded, "query")
    raw = RawRows(load(lines=[{"g": ["熊", "竹"]}, {"g": ["x", 3]}]), {"group": "g"}, WHERE, **GROUPS, quarantine=True)
    assert [row[:2] for row in FORMATS["duplicate_groups"].rows(raw, both_directions=False)] == [("熊", "竹")]


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
def test_layouts_of_json(tmp_path, load, content, options):
    (tmp_path / "0.json").write_text("")
    (tmp_path / "1.json").write_bytes(content.encode())
    assert texts(load("json", data_files="*.json", **options), "a") == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "column", "fault"),
    [
        ('{"a": "x"}\n{"a": \n', "a", "line 2: not valid JSON"),
        ('{"a": "x"}\n["x"]\n', "a", "line 2 is"),
        ('{"a": "x"}\n{"a": "\\ud83d"}\n', "a", "line 2, column 'a'"),
        ('["x"]', "a", "item 1 is 'x'"),
        ('{"b": "x"}', "a", "no column 'a'"),
        ('{"a": {"text": "x"}}', "a", "{'text': 'x'}, which is not text"),
        ('{"a": {"text": ["x", "y"]}}\n{"a": null}\n{"a": "z"}\n', "a.text", "without text"),
    ],
)
def test_faulty_json(tmp_path, load, refuses, content, column, fault):
    (tmp_path / "a.jsonl").write_text(content)
    with refuses(fault):
        texts(load("json", data_files="a.jsonl"), column)


def test_csv_texts_are_those_of_the_file_and_may_be_missing(tmp_path, load):
    first = ["NA", "None", "null", "00001", "1e5", "True", " x ", "2020-01-01", ""]
    values = [*first, *["filler"] * 10_000, "0.50", "nan"]
    lines = [f"{text}\t{number / 2:.2f}" for number, text in enumerate(values)]
    (tmp_path / "a.tsv").write_text("\n".join(["a\ts", *lines, ""]))
    loaded = load("csv", data_files="a.tsv", sep="\t")
    assert rows(loaded, "a", "s") == [(text, f"{number / 2:.2f}") for number, text in enumerate(values)]
    assert texts(loaded, "a") == [text for text in values if text.strip()]
    (tmp_path / "a.csv").write_text("a,b\nx,\n,y\nv,w\n")
    raw = RawRows(load("csv", data_files="a.csv"), {"text": "a", "label": "b"}, WHERE, texts=["text"], values=["label"])
    assert [row for _, row in raw] == [{"text": "v", "label": "w"}]
    assert raw.dropped == {"text is blank": 1, "label is missing": 1}
    # Unless the user asks for something else.
    assert rows(load("csv", data_files="a.csv", na_values=["w"]), "b") == [("",), ("y",), (None,)]
    (tmp_path / "index.csv").write_text(",a\n0,x\n1,y\n")
    loaded = load("csv", data_files="index.csv")
    assert texts(loaded, "a") == ["x", "y"] and len(loaded.column_names) == 2
