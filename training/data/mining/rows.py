"""Mined rows: a row's own negatives, then mined ones, and all other columns as far as they still fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.data.cleaning.normalise import normalise
from training.data.mining.search import MiningOptions
from training.data.published import PublishedFile, rows_table
from training.data.storage import SourceFile

_BATCH_ROWS = 8192
# Columns that describe the text of another one.
_OF_NEGATIVE = re.compile(r"(negative_(\d+))_(id|score)")


def mined_rows(
    files: Sequence[SourceFile], mined: Callable[[NDArray[np.int64]], NDArray[np.object_]], options: MiningOptions
) -> Iterator[pa.Table]:
    """Yield the rows of a source with ``options.negatives`` negatives, None where there are too few.

    ``mined`` maps ``(n,)`` numbers of rows to ``(n, options.negatives)`` texts or None. Rows with too few are left out
    unless ``options.keep_short``.
    """
    published = list(map(PublishedFile, files))
    others: dict[str, pa.DataType] = {}
    for file in published:
        for column in file.schema:
            described = _OF_NEGATIVE.fullmatch(column.name)
            if column.name in ("query", "passage", *file.negatives):
                continue
            # A column of nulls may have a type in another file.
            new = others.get(column.name, pa.null()) == pa.null()
            if new and not (described and int(described[2]) > options.negatives):
                others[column.name] = column.type
    row = 0
    for file in published:
        names = [] if options.replace else file.negatives
        for batch in file.record_batches(_BATCH_ROWS, all_columns=True):
            texts, own = mined(np.arange(row, row + len(batch))), batch.select(names).to_pylist()
            row += len(batch)
            filled = [_fill(*each) for each in zip(own, texts, strict=True)]
            kept = [i for i, each in enumerate(filled) if options.keep_short or each[-1][0] is not None]
            if not kept:
                continue
            batch = batch.take(pa.array(kept))
            columns = list(zip(*(filled[each] for each in kept), strict=True))
            negatives = [[text for text, _ in column] for column in columns]
            origins = {f"negative_{n}": [of for _, of in column] for n, column in enumerate(columns, start=1)}
            table = rows_table(*(batch.column(side).to_pylist() for side in ("query", "passage")), negatives)
            for name, kind in others.items():
                table = table.append_column(name, _column(batch, name, kind, origins))
            yield table


def _fill(own: Mapping[str, str | None], mined: NDArray[np.object_]) -> list[tuple[str | None, str | None]]:
    """Return a row's own negatives with their columns, then mined ones that are not spellings of them, then None."""
    texts: dict[str, str | None] = {}
    for column, text in own.items():
        if text is not None:
            texts.setdefault(text, column)
    forms = set(map(normalise, texts))
    for text in mined:
        if text is not None and not (forms and normalise(text) in forms):
            texts.setdefault(text, None)
    return [*texts.items(), *[(None, None)] * len(mined)][: len(mined)]


def _column(
    batch: pa.RecordBatch, name: str, kind: pa.DataType, origins: Mapping[str, Sequence[str | None]]
) -> pa.Array:
    """Return a column; what describes a negative moves with its text, which comes from the column in ``origins``."""
    if (described := _OF_NEGATIVE.fullmatch(name)) is None:
        return batch.column(name).cast(kind) if name in batch.schema.names else pa.nulls(len(batch), kind)
    columns = [of and f"{of}_{described[3]}" for of in origins[described[1]]]
    values = {each: batch.column(each).to_pylist() for each in {*columns} & {*batch.schema.names}}
    return pa.array([values[each][row] if each in values else None for row, each in enumerate(columns)], kind)
