"""Queries held out of a source before it is built, and the files on which models are then evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.data.building.examples import RawRows, Row, text_form, walk
from training.data.building.reader import RawData, as_text
from training.data.instructions import without_instruction
from training.data.published import write_parquet

# Parts of the names of a source's files: its held-out queries, and the texts to find their passages among.
HELD_OUT, CANDIDATES = ".held_out", ".candidates"
# Held out are at least and at most so many queries, but at most half of them.
LEAST, MOST = 100, 2000
_DRAW = 51
_ROWS_AT_ONCE = 10_000


def split_rows(data: RawData, column: str, share: float, most: float, seed: int, where: str) -> tuple[RawData, RawData]:
    """Return the rows to train on and those whose query, the text in ``column``, is held out, with all its rows.

    Queries that differ in spelling only are one. With a share of 1, nothing is trained on, and at most the share
    ``most`` of the queries is held out.
    """
    path = [column] if column in data.column_names else column.split(".")
    texts = (as_text(walk(row, path)) or "" for _, row in data.read([path[0]]))
    keys = np.fromiter((text_key(text_form(text)) for text in texts), dtype=np.uint64)
    distinct = np.unique(keys)
    if len(distinct) < 2:
        what = f"has {len(keys)} rows and {len(distinct)} different queries"
        raise UserError(f"{where}: {what}; give at least two, training contrasts queries with each other")
    least = len(distinct) if share == 1 else max(round(share * len(distinct)), LEAST)
    wanted = min(least, MOST, int(len(distinct) * (most if share == 1 else 0.5)))
    draws = keyed_bits(seed, _DRAW, distinct)
    held_out = np.isin(keys, distinct[np.argsort(draws, kind="stable")[:wanted]])
    return _part(data, ~held_out), _part(data, held_out)


def _part(data: RawData, mask: NDArray[np.bool_]) -> RawData:
    return replace(data, num_rows=int(mask.sum()), read=lambda columns: compress(data.read(columns), mask.tolist()))


def query_forms(raw: RawRows, role: str) -> frozenset[str]:
    """Return the normal forms of the queries, the texts of a role."""
    return frozenset(text_form(as_text(row[role]) or "") for _, row in raw)


def noted(rows: Iterable[Row], documents: dict[str, None]) -> Iterator[Row]:
    """Yield rows, and add their passages and negatives to some documents."""
    for row in rows:
        documents |= dict.fromkeys((row.passage, *row.positives, *row.negatives))
        yield row


def write_queries(path: Path, rows: Iterable[Row]) -> int:
    """Write queries with their passages, a row per passage, and with scores where they are graded; return how many."""
    lines, queries = [], set()
    for row in rows:
        query = without_instruction(row.query)
        queries.add(query)
        lines.append((query, row.passage, row.more.get("score", row.more.get("passage_score"))))
        scores = (row.more.get(f"positive_{number}_score") for number in range(2, len(row.positives) + 2))
        lines += [(query, *each) for each in zip(row.positives, scores, strict=True)]
    _write(path, lines, {"query": pa.string(), "passage": pa.string(), "score": pa.float64()})
    return len(queries)


def write_labels(path: Path, name: str, raw: RawRows) -> int:
    """Write the texts of raw rows, as column ``name``, with their labels; return how many there are."""
    lines = ((row["text"], as_text(row["label"])) for _, row in raw)
    return _write(path, lines, {name: pa.string(), "label": pa.string()})


def write_passages(path: Path, texts: Iterable[str]) -> None:
    """Write the texts among which passages are to be found."""
    _write(path, ((text,) for text in texts), {"passage": pa.string()})


def _write(path: Path, lines: Iterable[tuple[Any, ...]], columns: Mapping[str, pa.DataType]) -> int:
    iterator = iter(lines)

    def tables() -> Iterator[pa.Table]:
        while chunk := list(islice(iterator, _ROWS_AT_ONCE)):
            values = zip(*chunk, strict=True)
            yield pa.table({name: pa.array(v, kind) for (name, kind), v in zip(columns.items(), values, strict=True)})

    return write_parquet(path, tables())
