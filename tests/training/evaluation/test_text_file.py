"""Texts are read from parquet, csv and jsonl as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from training.evaluation.text_file import read_texts

COLUMNS = {"query": ["NA", "00001", 'a, "b"\nc'], "passage": ["null", "0.50", "大熊猫"]}


def _write(path: Path, columns: dict[str, list]) -> Path:
    rows = list(zip(*columns.values(), strict=True))
    if path.suffix == ".csv":
        quoted = [
            ",".join('"' + text.replace('"', '""') + '"' if "," in text else text for text in row) for row in rows
        ]
        path.write_text("\n".join([",".join(columns), *quoted]) + "\n", encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.csv", "pairs.jsonl", "pairs"])
def test_texts_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, COLUMNS)
    assert read_texts(path, ["query"], ["passage", "lang"]) == COLUMNS
    assert read_texts(path, ["passage"]) == {"passage": COLUMNS["passage"]}


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.csv", "pairs.jsonl"])
def test_what_is_missing_or_no_text_is_named(tmp_path: Path, refuses, name: str) -> None:
    with refuses(f"{name}: no such file"):
        read_texts(tmp_path / name, ["query"])
    path = _write(tmp_path / name, {"query": ["a", " "], "passage": ["b", "c"]})
    with refuses(f"{name}: column 'lang' is missing; it has query, passage"):
        read_texts(path, ["query", "lang"])
    with refuses(f"{name}: row 1, column 'query' is no text"):
        read_texts(path, ["query"])


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.parquet", b"no parquet", "not a readable parquet file"),
        ("a.csv", b"", "not a readable csv file"),
        ("a.csv", b"query,passage\n", "the file has no rows"),
        ("a.csv", b"query,passage\na,b\nc\n", "not a readable csv file"),
        ("a.csv", b"query,passage\na,\xff\n", "not a readable csv file"),
        ("a.csv", b"query,passage,query\na,b,c\n", "column 'query' is there twice"),
        ("a.jsonl", b"", "column 'query' is missing; it has none"),
        (
            "a.jsonl",
            b'{"query": "a", "passage": "b"}\n{"query": 42, "passage": "b"}\n',
            "row 1, column 'query' is no text",
        ),
        ("a.jsonl", b'{"query": "a", "passage": "b"}\n{"query": "c"}\n', "row 1, column 'passage' is no text"),
        ("a.jsonl", b'{"query": "a"', "line 1"),
        ("a.jsonl", b'["a", "b"]\n', "line 1 is no object"),
        ("a.jsonl", b'{"query": "\xff"}\n', "not a readable jsonl file"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path: Path, refuses, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with refuses(tmp_path / name, part):
        read_texts(tmp_path / name, ["query", "passage"])


def test_json_in_parquet_is_decoded(tmp_path, refuses) -> None:
    mixed = Dataset.from_dict({"query": ["大熊猫", "x"], "passage": ["竹", 3]}, on_mixed_types="use_json")
    mixed.to_parquet(tmp_path / "pairs.parquet")
    assert read_texts(tmp_path / "pairs.parquet", ["query"]) == {"query": ["大熊猫", "x"]}
    with refuses("pairs.parquet", "row 1", "'passage'"):
        read_texts(tmp_path / "pairs.parquet", ["passage"])
