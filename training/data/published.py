"""Reading the published format: one parquet file per source with `query`, `passage`, `negative_1` … `negative_n`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from training.common.errors import UserError
from training.data.instructions import without_instruction
from training.data.row_checks import bad_row, find_faults, text_column
from training.data.storage import RemoteFile, SourceFile, as_file, opened

# Of each column, at a time: a remote read is a request, a local one is cheap.
_BUFFER_BYTES, _REMOTE_BUFFER_BYTES = 1 << 20, 4 << 20
# A batch holds no more than either, as far as the file's sizes tell: the texts of a row may be short or whole books.
_BATCH_ROWS, _BATCH_BYTES = 8192, 32 << 20
# Read to learn the size of a row; of a remote file that would be fetched twice.
_PROBE_ROWS, _REMOTE_BATCH_ROWS = 64, 1024

_VIEWS = ((pa.types.is_string_view, pa.large_string()), (pa.types.is_binary_view, pa.large_binary()))


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


def _without_view(field: pa.Field) -> pa.Field:
    """A column as it is read: of views Arrow can neither filter nor take rows."""
    for is_view, plain in _VIEWS:
        if is_view(field.type):
            return field.with_type(plain)
    return field


class PublishedFile:
    """One parquet file of a source, read in batches and checked row by row.

    Args:
        path: The file: a path, or an address such as ``hf://datasets/OWNER/NAME@REVISION/a.parquet``.
        required_negatives: Negatives that every row must have.

    Raises:
        UserError: If the file is missing, out of reach, empty, no parquet, or lacks a column.
    """

    def __init__(self, path: str | SourceFile, required_negatives: int = 0) -> None:
        self.path = as_file(path)
        self.required_negatives = required_negatives
        with self._open() as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
        self.negatives = sorted(
            (name for name in schema.names if re.fullmatch(r"negative_\d+", name)),
            key=lambda name: int(name.removeprefix("negative_")),
        )
        self._check_columns(schema)
        self.schema = pa.schema([_without_view(field) for field in schema], metadata=schema.metadata)
        self.num_rows = metadata.num_rows
        self.row_group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if not self.num_rows:
            raise UserError(f"{path}: the file has no rows; build it again or leave it out")
        size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
        self.batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * self.num_rows // max(size, 1)))

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        buffer = _REMOTE_BUFFER_BYTES if isinstance(self.path, RemoteFile) else _BUFFER_BYTES
        with (
            opened(self.path) as handle,
            # Buffered, a column comes page by page; otherwise all columns of a row group are fetched at its start, and
            # the published files have one row group each.
            pq.ParquetFile(handle, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True) as parquet,
        ):
            yield parquet

    def _check_columns(self, schema: pa.Schema) -> None:
        for name in ("query", "passage"):
            if name not in schema.names:
                raise UserError(f"{self.path}: column {name!r} is missing; it has {', '.join(schema.names)}")
        self.require(self.required_negatives, "retrieval")
        for name in ("query", "passage", *self.negatives):
            self._check_text(schema, name)

    def require(self, negatives: int, task_type: str) -> None:
        """Refuses a file that has too few negative columns for a source of a task type.

        Raises:
            UserError: If it has.
        """
        there = len(self.negatives)
        if there >= negatives:
            return
        remedy = f"write 'num_hard_negatives_{task_type}: {there}'"
        if there == 0 and task_type != "retrieval":
            remedy = f"{task_type} learns from nothing else: leave the source out of 'sources'"
        raise UserError(
            f"{self.path}: {there} negative columns, but {negatives} negatives are drawn for each row; {remedy}, or "
            "add columns (training/mine.py finds negatives)"
        )

    def _check_text(self, schema: pa.Schema, name: str) -> None:
        if schema.names.count(name) > 1:
            raise UserError(f"{self.path}: column {name!r} is there twice; rename one of them")
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not _is_text(kind):
            raise UserError(f"{self.path}: column {name!r} holds {kind}, not text; convert it to strings")

    def batches(self, batch_rows: int | None = None, raw: bool = False, skip_bad: bool = False) -> Iterator[TextBatch]:
        """Yields the rows in order, ``batch_rows`` at a time; by default as many as some megabytes hold.

        Args:
            batch_rows: Rows of a batch at most.
            raw: Take off the instructions that queries bring along: what is compared is the text alone.
            skip_bad: Leave bad rows out.

        Raises:
            UserError: At the first bad row, unless they are left out.
        """
        row = 0
        for batch in self.record_batches(batch_rows):
            faults, rows = find_faults(batch, self.negatives, self.required_negatives), len(batch)
            if faults and not skip_bad:
                raise bad_row(self.path, row, faults[0])
            if faults:
                bad = {fault.row for fault in faults}
                batch = batch.take(pa.array([number for number in range(rows) if number not in bad], type=pa.int64()))
            columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
            if raw:
                columns["query"] = [without_instruction(text) for text in columns["query"]]
            yield TextBatch(row, columns)
            row += rows

    def record_batches(
        self,
        batch_rows: int | None = None,
        row_groups: tuple[int, int] | None = None,
        all_columns: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """Yields query, passage and negatives as they are in the file, bad rows and all.

        Args:
            batch_rows: Rows of a batch at most; by default as many as some megabytes hold.
            row_groups: First row group to read and the one after the last; all if None.
            all_columns: Whether to yield every column of the file, in its order.

        Raises:
            UserError: If the file cannot be read to the end.
        """
        columns = None if all_columns else ["query", "passage", *self.negatives]
        groups = None if row_groups is None else list(range(*row_groups))
        with self._open() as parquet:
            rows = min(batch_rows or _BATCH_ROWS, self.batch_rows)
            # The sizes in the file tell nothing of texts that repeat, which it holds once and a batch many times.
            if isinstance(self.path, RemoteFile):
                rows = min(rows, _REMOTE_BATCH_ROWS)
            else:
                first = next(parquet.iter_batches(_PROBE_ROWS, row_groups=groups, columns=columns))
                rows = min(rows, max(1, _BATCH_BYTES * len(first) // max(first.nbytes, 1)))
            for batch in parquet.iter_batches(rows, row_groups=groups, columns=columns):
                yield batch.cast(pa.schema([self.schema.field(name) for name in batch.schema.names]))

    def further_columns(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields other columns of texts than query, passage and negatives, as ``large_string``, in order.

        Args:
            names: Columns that the file has.

        Raises:
            UserError: If a column holds no text or cannot be read.
        """
        for name in names:
            self._check_text(self.schema, name)
        with self._open() as parquet:
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=list(names)):
                yield pa.record_batch({name: text_column(batch, name) for name in names})
