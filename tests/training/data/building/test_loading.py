"""Loading raw data: texts come out as they stand in the files, and what cannot be loaded is said in one line."""

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

from training.data.building.formats.duplicates import duplicate_groups
from training.data.building.loading import load_raw
from training.data.building.raw import RawRows

Refuses = Callable[..., AbstractContextManager[None]]
WHERE = "build.yaml: source 'some'"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(loaded: Any, *columns: str, **options: Any) -> list[tuple[Any, ...]]:
    raw = RawRows(loaded, {name: name for name in columns}, WHERE, values=columns, **options)
    return [tuple(row.values()) for _, row in raw]


def text_rows(loaded: Any, column: str, **options: Any) -> list[str]:
    return [row["text"] for _, row in RawRows(loaded, {"text": column}, WHERE, texts=["text"], **options)]


def write_json(path: Path, *lines: Any) -> None:
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")


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
        assert rows(absolute, "a", "n") == rows(loaded, "a", "n")
    else:
        loaded = load_raw(WHERE, "raw", tmp_path, **options)
    numbers = ["1", "2"] if kind == "csv" else [1, 2]
    assert rows(loaded, "n", "a") == list(zip(numbers, data["a"], strict=True))


def test_load_options_and_splits_arrive(tmp_path: Path) -> None:
    (tmp_path / "raw.tsv").write_text("a\tb\nx\ty\nv\tw\n", encoding="utf-8")
    loaded = load_raw(WHERE, "csv", tmp_path, data_files="raw.tsv", sep="\t", split="train[:1]")
    assert loaded.to_list() == [{"a": "x", "b": "y"}]


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("json", {"data_files": "none.jsonl"}),
        ("json", {"data_files": "good.jsonl", "split": "test"}),
        ("json", {"data_files": "good.jsonl", "nonsense": 1}),
        ("some/set-that-is-nowhere", {}),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, refuses: Refuses, dataset: str, options: dict[str, Any]) -> None:
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


@pytest.mark.parametrize("pattern", ["none.jsonl", "raw/*.jsonl", ["good.jsonl", "none*.jsonl"]])
@pytest.mark.parametrize("dataset", ["json", "csv", "text"])
def test_files_that_are_not_there(tmp_path: Path, refuses: Refuses, dataset: str, pattern: Any) -> None:
    write_json(tmp_path / "good.jsonl", {"a": "x"})
    with refuses(WHERE, "data_files", "no file", str(tmp_path)):
        load_raw(WHERE, dataset, tmp_path, data_files=pattern, split="train")


@pytest.mark.parametrize("dataset", ["json", "csv", "text"])
@pytest.mark.parametrize("content", ["", "a,b\n"])
def test_files_without_rows(tmp_path: Path, refuses: Refuses, dataset: str, content: str) -> None:
    if content and dataset != "csv":
        pytest.skip("a file of that kind has a row")
    (tmp_path / "empty").write_text(content)
    with refuses(WHERE, "no rows"):
        load_raw(WHERE, dataset, tmp_path, data_files="empty", split="train")


def test_an_empty_file_among_others(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").write_text("")
    write_json(tmp_path / "2.jsonl", {"a": "x"})
    assert text_rows(load_raw(WHERE, "json", tmp_path, data_files="*.jsonl", split="train"), "a") == ["x"]


@pytest.mark.parametrize("kind", ["json", "csv", "text"])
def test_bytes_that_are_not_utf8(tmp_path: Path, refuses: Refuses, kind: str) -> None:
    (tmp_path / "bad").write_bytes(b'a,b\n"\xff",x\n')
    with refuses(WHERE, "cannot load", "utf-8"):
        load_raw(WHERE, kind, tmp_path, data_files="bad", split="train")


def test_scripts_are_not_run(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "some.py").write_text("raise SystemExit\n")
    with refuses(WHERE, "scripts are no longer supported", "parquet"):
        load_raw(WHERE, "some", tmp_path, split="train")


def test_a_number_changes_no_other_text(tmp_path: Path, refuses: Refuses) -> None:
    write_json(tmp_path / "a.jsonl", {"query": "大熊猫", "pos": "竹"}, {"query": 42, "pos": ["x"]})
    loaded = load_raw(WHERE, "json", tmp_path, data_files="a.jsonl", split="train")
    assert text_rows(loaded, "pos") == ["竹", "x"]
    assert text_rows(loaded, "query", quarantine=True) == ["大熊猫"]
    with refuses(WHERE, str(tmp_path / "a.jsonl"), "line 2", "'query'", "42", "int"):
        text_rows(loaded, "query")


def test_texts_that_read_as_something_else(tmp_path: Path) -> None:
    texts = ["42", "007", "0.50", "null", "true", "NaN", '"quoted"', '{"a": 1}', "2020-01-01", "\u2028", "NA"]
    lines = [{"a": text, "n": number if number % 2 else str(number)} for number, text in enumerate(texts)]
    write_json(tmp_path / "a.jsonl", *lines)
    loaded = load_raw(WHERE, "json", tmp_path, data_files="a.jsonl", split="train")
    assert rows(loaded, "a", "n") == [tuple(line.values()) for line in lines]
    write_json(tmp_path / "dates.jsonl", {"a": "2020-01-01"})
    assert text_rows(load_raw(WHERE, "json", tmp_path, data_files="dates.jsonl", split="train"), "a") == ["2020-01-01"]


def test_a_number_far_behind_is_still_found(tmp_path: Path, refuses: Refuses) -> None:
    write_json(tmp_path / "a.jsonl", *({"a": "text " * 10} for _ in range(3000)), {"a": 42.5})
    loaded = load_raw(WHERE, "json", tmp_path, data_files="a.jsonl", split="train", chunksize=1 << 14)
    with refuses("line 3001", "42.5"):
        text_rows(loaded, "a")


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": "x", "n": 1}, {"a": "y"}]',
        '[\n {"a": "x"},\n {"a": "y"}\n]\n',
        '\ufeff{"a": "x"}\n\n{"a": "y"}',
        '{"a": "x"}\r\n{"b": [1, "z"]}\r\n{"a": "y"}\r\n',
    ],
)
def test_layouts_of_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_bytes(content.encode())
    loaded = load_raw(WHERE, "json", tmp_path, data_files="a.json", split="train")
    assert text_rows(loaded, "a") == ["x", "y"]


def test_rows_below_a_key(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 2, "data": [{"a": "x"}, {"a": "2"}]}, indent=1))
    loaded = load_raw(WHERE, "json", tmp_path, data_files="a.json", split="train", field="data")
    assert (len(loaded), text_rows(loaded, "a")) == (2, ["x", "2"])


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('{"a": "x"}\n{"a": \n', "line 2: not valid JSON"),
        ('{"a": "x"}\n["x"]\n', "line 2 is"),
        ('{"a": "x"}\n{"a": "y", "a": "z"}\n', "key 'a' stands twice"),
        ('{"a": "x"}\n{"a": "\\ud83d"}\n', "line 2, column 'a'"),
        ('{"a": "x"}\n' + '{"a": ' * 100_000 + "\n", "line 2: not valid JSON"),
        ('["x"]', "item 1 is 'x'"),
        ('{"b": "x"}', "no column 'a'"),
        ('{"a": {"text": "x"}}', "dict"),
    ],
)
def test_json_that_is_faulty(tmp_path: Path, refuses: Refuses, content: str, place: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with refuses(place):
        text_rows(load_raw(WHERE, "json", tmp_path, data_files="a.jsonl", split="train"), "a")


def test_a_path_that_a_row_does_not_have(tmp_path: Path, refuses: Refuses) -> None:
    write_json(tmp_path / "a.jsonl", {"a": {"text": ["x", "y"]}}, {"a": None}, {"a": "z"})
    with refuses("line 3", "without text"):
        text_rows(load_raw(WHERE, "json", tmp_path, data_files="a.jsonl", split="train"), "a.text")


def test_splits_of_json(tmp_path: Path) -> None:
    for number in range(2):
        write_json(tmp_path / f"{number}.jsonl", {"a": f"x{number}"}, {"a": f"y{number}"})
    loaded = load_raw(WHERE, "json", tmp_path, data_files="[01].jsonl", split="train[1:3]")
    assert text_rows(loaded, "a") == ["y0", "x1"]


def test_csv_texts_are_what_the_file_says(tmp_path: Path) -> None:
    texts = ["NA", "None", "null", "00001", "1e5", "0.50", "True", " x ", "2020-01-01", "", "1", *["filler"] * 10_000]
    texts += ["00001", "0.50", "nan"]
    lines = [f"{text},{number},{number / 2:.2f}" for number, text in enumerate(texts)]
    for name, mark in (("a.csv", ","), ("b.tsv", "\t")):
        text = "\n".join(["a,n,s", *lines]).replace(",", mark)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
        loaded = load_raw(WHERE, "csv", tmp_path, data_files=name, split="train", sep=mark)
        assert loaded["a"][:] == texts
        assert text_rows(loaded, "a") == [text for text in texts if text.strip()]
        assert loaded["s"][:] == [f"{number / 2:.2f}" for number in range(len(texts))]


def test_missing_fields_of_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\nx,\n,y\nv,w\n")
    loaded = load_raw(WHERE, "csv", tmp_path, data_files="a.csv", split="train")
    raw = RawRows(loaded, {"text": "a", "label": "b"}, WHERE, texts=["text"], values=["label"])
    assert [row for _, row in raw] == [{"text": "v", "label": "w"}]
    assert raw.dropped == {"text is blank": 1, "label is missing": 1}
    # As asked for, all the same.
    asked = load_raw(WHERE, "csv", tmp_path, data_files="a.csv", split="train", na_values=["w"])
    assert asked["b"][:] == ["", "y", None]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_types_of_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"a": pa.array(["x", None, "y"]).cast(kind)}), tmp_path / "a.parquet")
    loaded = load_raw(WHERE, "parquet", tmp_path, data_files="a.parquet", split="train")
    assert text_rows(loaded, "a") == ["x", "y"]


def test_a_number_in_a_group_of_a_file(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "a.jsonl").write_text('{"g": ["大熊猫", "竹"]}\n{"g": ["x", 3]}\n', encoding="utf-8")
    loaded = load_raw("build.yaml", "json", tmp_path, data_files="a.jsonl", split="train")
    with refuses("a.jsonl: line 2", "'g'", "['x', 3]", "not a list of texts"):
        raw = RawRows(loaded, {"group": "g"}, "build.yaml", values=["group"], optional=["lang"])
        list(duplicate_groups(raw, both_directions=False))
    raw = RawRows(loaded, {"group": "g"}, "build.yaml", values=["group"], optional=["lang"], quarantine=True)
    assert [row[:2] for row in duplicate_groups(raw, both_directions=False)] == [("大熊猫", "竹")]
    assert raw.dropped == {"group is not text": 1}


@pytest.mark.parametrize("rows", ["1,2,3\n4,5\n", "4,5\n1,2,3\n", "1,2,3,4\n", "x,y,z\n" * 3])
def test_a_csv_row_of_too_many_fields(tmp_path: Path, refuses: Refuses, rows: str) -> None:
    (tmp_path / "a.csv").write_text(f"a,b\n{rows}")
    with refuses(WHERE, "cannot load"):
        load_raw(WHERE, "csv", tmp_path, data_files="a.csv", split="train")


def test_the_first_column_of_a_csv_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",a\n0,x\n1,y\n")
    loaded = load_raw(WHERE, "csv", tmp_path, data_files="a.csv", split="train")
    assert text_rows(loaded, "a") == ["x", "y"] and len(loaded.column_names) == 2
