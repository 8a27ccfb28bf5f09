"""Columns of texts from a file: parquet, csv or jsonl."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from training.common.errors import UserError, in_one_line
from training.common.paths import RULE
from training.data.parquet import columns_of


def read_texts(path: Path | str, columns: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Reads columns of texts from a file; ``.csv`` and ``.jsonl`` are read as such, all else as parquet.

    A csv file has its columns' names in the first line; its cells are texts as they are, ``NA`` and ``01`` too. Rows
    are numbered from 0, the names not counted.

    Args:
        path: The file.
        columns: What it must have.
        optional: What is read too if it is there.

    Raises:
        UserError: If the file cannot be read, lacks a column, has no rows, or a cell holds no text.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path ({RULE})")
    kind, read = _READERS.get(path.suffix.lower(), ("parquet", pq.read_table))
    try:
        table = read(path)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = in_one_line(error)
        raise UserError(f"{path}: not a readable {kind} file ({reason}); give .parquet, .csv or .jsonl") from None
    for name in columns:
        if name not in table.column_names:
            raise UserError(f"{path}: column {name!r} is missing; it has {', '.join(table.column_names) or 'none'}")
    there = [*columns, *(name for name in optional if name in table.column_names and name not in columns)]
    for name in there:
        if table.column_names.count(name) > 1:
            raise UserError(f"{path}: column {name!r} is there twice; rename one of them")
    if not table.num_rows:
        raise UserError(f"{path}: the file has no rows; build it again")
    result = columns_of(table.select(there))
    for name, values in result.items():
        for row, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: row {row}, column {name!r} is no text; correct or drop the row")
    return result


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        names = next(csv.reader(handle), [])
    return pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        # Without types, "01" would be a number and "NA" would be missing.
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


def _read_jsonl(path: Path) -> pa.Table:
    rows = []
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                rows.append(_json_row(line, number))
    names = list(dict.fromkeys(name for row in rows for name in row))
    # What is no text is left out: it is refused as a missing one is, by its row and column.
    texts = {name: [text if isinstance(text := row.get(name), str) else None for row in rows] for name in names}
    return pa.table({name: pa.array(values, pa.string()) for name, values in texts.items()})


def _json_row(line: str, number: int) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no object such as {{'query': …, 'passage': …}}")
    return row


_READERS: dict[str, tuple[str, Callable[[Path], pa.Table]]] = {
    ".csv": ("csv", _read_csv),
    ".jsonl": ("jsonl", _read_jsonl),
}
