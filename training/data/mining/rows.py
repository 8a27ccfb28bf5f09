"""A source as mining sees it: distinct queries and passages by number, on disk, and rows as pairs of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.data.cleaning.normalise import normalise
from training.data.manifest import Source
from training.data.mining.text_ids import ID, Ids, distinct, text_ids
from training.data.mining.text_store import TextStore
from training.data.parquet import rows_table, write_parquet
from training.data.published import PublishedFile

SIDES = ("query", "passage")
_BATCH_ROWS = 8192


class SourceRows(NamedTuple):
    """The rows of a source.

    Attributes:
        ids: Ids of the distinct queries and of the distinct passages, by side, in the order of first occurrence.
        numbers: ``(rows,)`` numbers of each row's query and passage, by side.
        first: Rows of first occurrence, by side.
    """

    ids: dict[str, Ids]
    numbers: dict[str, NDArray[np.int64]]
    first: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.numbers["query"])

    def write_texts(self, source: Source, folder: Path) -> None:
        """Writes the distinct texts to ``<side>.arrow``, numbered as the ids are."""
        for side in SIDES:
            TextStore.write(folder / f"{side}.arrow", self._texts(source, side))

    def _texts(self, source: Source, side: str) -> Iterator[str]:
        row, first = 0, self.first[side]
        for path in source.files:
            for batch in PublishedFile(path).batches(_BATCH_ROWS):
                own = first[np.searchsorted(first, row) : np.searchsorted(first, row + len(batch))]
                texts = batch.columns[side]
                yield from (texts[position] for position in (own - row).tolist())
                row += len(batch)


def read_rows(source: Source) -> SourceRows:
    """Reads and checks a source; only its ids are held in memory.

    Raises:
        UserError: If a file is faulty or a query or passage is missing.
    """
    read: dict[str, list[Ids]] = {side: [np.zeros(0, dtype=ID)] for side in SIDES}
    for path in source.files:
        for batch in PublishedFile(path).batches(_BATCH_ROWS, raw=True):
            for side in SIDES:
                read[side].append(text_ids(batch.columns[side]))
    found = {side: distinct(np.concatenate(parts)) for side, parts in read.items()}
    ids, numbers, first = ({side: found[side][part] for side in SIDES} for part in range(3))
    return SourceRows(ids, numbers, first)


def positives(
    form: NDArray[np.int64], query: NDArray[np.int64], passage: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of each query and the passages of all rows whose query is it in whatever spelling, sorted by query.

    Args:
        form: ``(queries,)`` form of each query.
        query: ``(rows,)`` number of each row's query.
        passage: ``(rows,)`` number of its passage.

    Returns:
        ``(pairs,)`` numbers of queries, and of passages.
    """
    forms, passages = np.unique(np.stack([form[query], passage]), axis=1)
    start, stop = (np.searchsorted(forms, form, side) for side in ("left", "right"))
    counts = stop - start
    place = np.arange(counts.sum()) + np.repeat(start + counts - np.cumsum(counts), counts)
    return np.repeat(np.arange(len(form)), counts), passages[place]


class _Output:
    """Rows on their way to the output, counted."""

    def __init__(self, source: Source, negatives: int, keep_short: bool, replace: bool) -> None:
        self.counts = {"rows": 0, "kept": 0, "dropped": 0}
        self._source, self._negatives, self._keep_short, self._replace = source, negatives, keep_short, replace
        self._more: dict[str, pa.DataType] = {}
        for path in source.files:
            file = PublishedFile(path)
            ours, schema = {*SIDES, *file.negatives}, file.schema
            self._more |= {
                name: schema.field(name).type for name in schema.names if name not in ours and name not in self._more
            }

    def tables(self, numbers: NDArray[np.int64], mined: NDArray[np.int64], passages: TextStore) -> Iterator[pa.Table]:
        row = 0
        for path in self._source.files:
            names = [] if self._replace else PublishedFile(path).negatives
            for batch in PublishedFile(path).record_batches(_BATCH_ROWS, all_columns=True):
                texts = passages.take(mined[numbers[row : row + len(batch)]])
                row += len(batch)
                existing = zip(*(batch.column(name).to_pylist() for name in names), strict=True)
                own = list(existing) if names else [()] * len(batch)
                table = self._table(batch, [_fill(*row, self._negatives) for row in zip(own, texts, strict=True)])
                if len(table):
                    yield table

    def _table(self, batch: pa.RecordBatch, negatives: list[list[str | None]]) -> pa.Table:
        kept = [row for row, texts in enumerate(negatives) if self._keep_short or texts[-1] is not None]
        self.counts["rows"] += len(batch)
        self.counts["kept"] += len(kept)
        self.counts["dropped"] += len(batch) - len(kept)
        batch = batch.take(pa.array(kept, type=pa.int64()))
        columns = zip(*(negatives[row] for row in kept), strict=True) if kept else [()] * self._negatives
        table = rows_table(*(batch.column(side).to_pylist() for side in SIDES), list(columns))
        for name, kind in self._more.items():
            there = name in batch.schema.names
            table = table.append_column(name, batch.column(name).cast(kind) if there else pa.nulls(len(batch), kind))
        return table


def _fill(own: Sequence[str | None], mined: Sequence[str | None], negatives: int) -> list[str | None]:
    """A row's own negatives first, then mined ones that are not among them, in whatever spelling, then None."""
    texts = dict.fromkeys(text for text in own if text is not None)
    forms = set(map(normalise, texts))
    texts |= dict.fromkeys(text for text in mined if text is not None and not (forms and normalise(text) in forms))
    return [*texts, *[None] * negatives][:negatives]


def write_mined(
    source: Source,
    path: Path,
    numbers: NDArray[np.int64],
    mined: NDArray[np.int64],
    passages: TextStore,
    *,
    keep_short: bool,
    replace: bool,
) -> dict[str, Any]:
    """Writes a source with its mined negatives, in the order of its rows and with all its other columns.

    Args:
        source: The source.
        path: The parquet file; it is left as it is if no row is left.
        numbers: ``(rows,)`` numbers of the rows' queries.
        mined: ``(queries, negatives)`` numbers of passages, -1 where there are too few.
        passages: Their texts.
        keep_short: Keep rows with fewer negatives.
        replace: Leave out the negatives that rows have.

    Returns:
        Rows read, kept and dropped.
    """
    output = _Output(source, mined.shape[1], keep_short, replace)
    tables = output.tables(numbers, mined, passages)
    first = next(tables, None)
    if first is not None:
        write_parquet(path, chain([first], tables))
    return output.counts
