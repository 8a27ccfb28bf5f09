"""Bad rows that were put aside, written as they come: there may be as many as good ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq


class QuarantineWriter:
    """A parquet file that is there only if a row was written to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> QuarantineWriter:
        # Left by a task that was killed.
        self._path.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Writes some rows; all tables have the columns of the first."""
        self._writer = self._writer or pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)


def join_quarantines(parts: Sequence[Path], path: Path) -> dict[str, int]:
    """Writes the bad rows of all shards to one file, if there are any.

    Args:
        parts: The shards' files, in order; those that are not there have no bad rows.
        path: The file to write.

    Returns:
        The number of rows by reason.
    """
    parts = [part for part in parts if part.exists()]
    if not parts:
        return {}
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts])
    reasons: Counter[str] = Counter()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(1024):
                    columns = {name: pa.nulls(len(batch), schema.field(name).type) for name in schema.names}
                    columns |= dict(zip(batch.schema.names, batch.columns, strict=True))
                    writer.write_table(pa.table(columns, schema=schema))
                    reasons.update(batch.column("reason").to_pylist())
    return dict(sorted(reasons.items()))
