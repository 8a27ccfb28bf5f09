"""Parquet files: writing the published format in row groups of a size that streams, and reading values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# Some megabytes: readers of a few rows need not fetch the whole file.
ROW_GROUP_ROWS = 10_000


def rows_table(
    queries: Sequence[str],
    passages: Sequence[str],
    negatives: Sequence[Sequence[str | None]] = (),
    **more: Sequence[str | None],
) -> pa.Table:
    """Rows in the published format: ``query``, ``passage``, ``negative_1`` … and further columns of text.

    Args:
        queries: ``n`` texts.
        passages: ``n`` texts.
        negatives: One column of ``n`` texts for each negative, the hardest first.
        **more: Further columns, such as ``lang``.
    """
    columns = {"query": queries, "passage": passages}
    columns |= {f"negative_{number}": column for number, column in enumerate(negatives, start=1)}
    return pa.table({name: pa.array(values, type=pa.string()) for name, values in (columns | more).items()})


def columns_of(table: pa.Table) -> dict[str, list[Any]]:
    """The values of a table, column by column.

    ``datasets`` keeps a column that holds texts and other things as JSON; its values are decoded.
    """
    if "extension<arrow.json>" not in str(table.schema):
        return table.to_pydict()
    # Only here: it takes a second to import.
    from datasets import Dataset

    return Dataset(table)[:]


def write_parquet(path: Path, tables: Iterable[pa.Table]) -> int:
    """Writes tables of one schema to a file, which is whole or absent, and returns the number of rows.

    Args:
        path: The file; its folder must be there.
        tables: Written as they come, so that they need never be in memory together.

    Raises:
        ValueError: If there are no tables.
    """
    partial = path.with_name(f".{path.name}.partial")
    writer, rows = None, 0
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            rows += len(table)
        if writer is None:
            raise ValueError(f"{path}: there are no rows to write")
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return rows
