"""What the tests of preparation read of sources, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from training.data.manifest import Source
from training.data.prepared import PreparedSource

Row = tuple[str | None, ...]


def published_rows(source: Source) -> Iterator[Row]:
    for path in source.files:
        for row in pq.read_table(path).to_pylist():
            yield tuple(text for column, text in row.items() if column != "lang")


def prepared_rows(prepared: PreparedSource, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Row]]:
    """The texts of the rows by split, decoded, without the negatives that a row does not have."""
    texts = [tokenizer.decode(prepared.tokens(text)[:-1]) for text in range(prepared.description["texts"])]
    return {
        split: [tuple(texts[position] for position in row if position >= 0) for row in rows.tolist()]
        for split, rows in prepared.rows.items()
    }


def all_rows(prepared: PreparedSource, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    return list(chain(*prepared_rows(prepared, tokenizer).values()))


def distinct_documents(rows: list[Row]) -> set[str]:
    return {text for row in rows for text in row[1:]}


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder of prepared sources, but for the times that are remembered of their files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != ".hashes"
    }


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
