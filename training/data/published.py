"""Reading the published format: one parquet file per source with `query`, `passage`, `negative_1` … `negative_n`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.row_checks import bad_row, find_faults
from training.errors import UserError

__all__ = ["PublishedFile", "TextBatch"]


@dataclass(frozen=True)
class TextBatch:
    """Some rows of a file, column by column.

    Attributes:
        first_row: Number of the first row within the file, from 0.
        columns: ``query``, ``passage`` and negatives in order; a missing negative is None.
    """

    first_row: int
    columns: dict[str, list[str | None]]

    def __len__(self) -> int:
        return len(self.columns["query"])


def _is_text(kind: pa.DataType) -> bool:
    # A column of nothing but nulls has a type of its own.
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(kind) for is_kind in kinds)


class PublishedFile:
    """One parquet file of a source, read in batches and checked row by row.

    Args:
        path: The file.
        required_negatives: Negatives that every row must have.

    Raises:
        UserError: If the file is missing, empty, no parquet, or lacks a column.
    """

    def __init__(self, path: Path, required_negatives: int = 0) -> None:
        self.path = path
        self.required_negatives = required_negatives
        with self._open() as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
        self.negatives = sorted(
            (name for name in schema.names if re.fullmatch(r"negative_\d+", name)),
            key=lambda name: int(name.removeprefix("negative_")),
        )
        self._check_columns(schema)
        self.num_rows = metadata.num_rows
        self.row_group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if not self.num_rows:
            raise UserError(f"{path}: the file has no rows; rebuild it or take it out of the manifest")

    def _open(self) -> pq.ParquetFile:
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file; download or build it")
        if not self.path.stat().st_size:
            raise UserError(f"{self.path}: the file is empty; download or build it again")
        try:
            return pq.ParquetFile(self.path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self.path}: not a readable parquet file ({reason}); download or build it again")

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in ("query", "passage"):
            if name not in schema.names:
                raise UserError(f"{self.path}: column {name!r} is missing; it has {', '.join(schema.names)}")
        if len(self.negatives) < self.required_negatives:
            raise UserError(
                f"{self.path}: {len(self.negatives)} negative columns, but the recipe samples "
                f"{self.required_negatives} per row; add columns or lower num_hard_negatives for this task type"
            )
        for name in ("query", "passage", *self.negatives):
            if schema.names.count(name) > 1:
                raise UserError(f"{self.path}: column {name!r} is there twice; rename one of them")
            kind = schema.field(name).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not _is_text(kind):
                raise UserError(f"{self.path}: column {name!r} holds {kind}, not text; convert it to strings")

    def batches(self, batch_rows: int = 8192) -> Iterator[TextBatch]:
        """Yields the rows in order, ``batch_rows`` at a time.

        Raises:
            UserError: At the first bad row.
        """
        row = 0
        for batch in self.record_batches(batch_rows):
            faults = find_faults(batch, self.negatives, self.required_negatives)
            if faults:
                raise bad_row(self.path, row, faults[0])
            yield TextBatch(row, {name: batch.column(name).to_pylist() for name in batch.schema.names})
            row += len(batch)

    def record_batches(self, batch_rows: int, row_groups: tuple[int, int] | None = None) -> Iterator[pa.RecordBatch]:
        """Yields query, passage and negatives as they are in the file, bad rows and all.

        Args:
            batch_rows: Rows of a batch at most.
            row_groups: First row group to read and the one after the last; all if None.

        Raises:
            UserError: If the file cannot be read to the end.
        """
        columns = ["query", "passage", *self.negatives]
        groups = None if row_groups is None else list(range(*row_groups))
        try:
            with self._open() as parquet:
                yield from parquet.iter_batches(batch_rows, row_groups=groups, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
