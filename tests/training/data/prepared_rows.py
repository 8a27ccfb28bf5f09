"""What the tests of preparation read of sources, before and after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow.parquet as pq

from training.data.manifest import Source
from training.data.prepared import PreparedSource

Row = tuple[str | None, ...]
# The fixtures run, decode, write_source and write_columns, and refuses.
Run = Callable[..., PreparedSource]
Decode = Callable[..., list[Row]]
Write = Callable[..., Source]
Refuses = Callable[..., AbstractContextManager[None]]


def published_rows(source: Source) -> list[Row]:
    rows = [row for path in source.files for row in pq.read_table(path).to_pylist()]
    return [tuple(text for column, text in row.items() if column != "lang") for row in rows]


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder of prepared sources, but for the remembered hashes of files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".hashes")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
