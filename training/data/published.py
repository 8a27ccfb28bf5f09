"""The published format: parquet with the text columns ``query``, ``passage`` and ``negative_1`` … ``negative_n``.

Optional are further positives, ``positive_2`` … ``positive_p``, and document ids, such as ``passage_id``. Sources of
the task type ``similarity`` have query, passage and a number, ``score``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training.common.errors import UserError
from training.common.outputs import whole_file
from training.data.cleaning.normalise import form_keys, same_form
from training.data.instructions import without_instruction
from training.data.storage import RemoteFile, SourceFile, opened

# Longer texts are broken dumps rather than documents.
MOST_CHARACTERS = 1_000_000
# Some megabytes, so that readers of a few rows need not fetch the whole file.
ROW_GROUP_ROWS = 10_000
# Per column: a remote read is a request, a local one is cheap.
_BUFFER_BYTES, _REMOTE_BUFFER_BYTES = 1 << 20, 4 << 20
# Limits of a batch: the texts of a row may be short or whole books.
_BATCH_ROWS, _BATCH_BYTES = 8192, 32 << 20
# Rows read to measure the size of a row. Of a remote file they would be fetched twice: its batches are small instead.
_PROBE_ROWS, _REMOTE_BATCH_ROWS = 64, 1024


class Fault(NamedTuple):
    """What is wrong with one row of a batch; the reason is such as ``is null``."""

    row: int
    column: str
    reason: str


def bad_row(path: object, first_row: int, fault: Fault, remedy: str = "correct or drop the row") -> UserError:
    """Return the error for a bad row of a batch that starts at a row of a file."""
    return UserError(f"{path}: row {first_row + fault.row}, column {fault.column!r} {fault.reason}", remedy)


def text_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """Return a text column as ``large_string``."""
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string())


def scores_of(batch: pa.RecordBatch, column: str = "score") -> np.ndarray:
    """Return the ``(n,)`` float32 scores of a batch, NaN where one is null."""
    values = batch.column(column).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    # Infinite where a number is too great.
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


class DocumentColumns(NamedTuple):
    """The columns of a row's documents, each in order."""

    positives: list[str]  # the passage, then the further ones
    negatives: list[str]
    ids: list[str]  # of documents


def document_columns(names: Sequence[str]) -> DocumentColumns:
    """Find the columns of documents among those of a file or batch."""

    def numbered(kind: str) -> list[str]:
        found = [name for name in names if re.fullmatch(rf"{kind}_\d+", name)]
        return sorted(found, key=lambda name: int(name.removeprefix(f"{kind}_")))

    positives, negatives = ["passage", *numbered("positive")], numbered("negative")
    return DocumentColumns(
        positives, negatives, [f"{each}_id" for each in positives + negatives if f"{each}_id" in names]
    )


def find_faults(batch: pa.RecordBatch, required_negatives: int = 0, task_type: str = "retrieval") -> list[Fault]:
    """Return every fault of every row of a batch, sorted by row.

    Negatives may be null as long as enough are left, and positives other than the passage.
    """

    def true(mask: pa.Array) -> np.ndarray:
        return np.asarray(pc.fill_null(mask, False))

    faults: list[Fault] = []
    count = np.zeros(len(batch), dtype=np.int64)
    # What negatives are compared with.
    positives: dict[str, tuple[pa.Array, np.ndarray | None]] = {}
    columns = document_columns(batch.schema.names)
    ids = {name: _decoded(text_column(batch, name)) for name in columns.ids}
    for name in ("query", *columns.positives, *columns.negatives):
        column, undecodable = _decoded(text_column(batch, name))
        missing = np.asarray(pc.is_null(column)) & ~undecodable
        found = {"is not UTF-8": undecodable}
        if name in columns.negatives:
            count += ~missing
            for other, (texts, keys) in positives.items():
                equal = true(pc.equal(column, texts))
                found[f"equals column {other!r}"] = equal
                found[f"is column {other!r} in another spelling"] = same_form(column, texts, keys) & ~equal
                if f"{name}_id" in ids and f"{other}_id" in ids:
                    same = true(pc.equal(*(ids[f"{each}_id"][0] for each in (name, other))))
                    found[f"has the document id of column {other!r}"] = same
        elif name in ("query", "passage"):
            found["is null"] = missing
        found["is empty"] = true(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0))
        too_long = true(pc.greater(pc.utf8_length(column), MOST_CHARACTERS))
        found[f"has more than {MOST_CHARACTERS:,} characters"] = too_long
        if name in columns.positives:
            positives[name] = column, form_keys(column) if columns.negatives else None
        faults += [Fault(row, name, why) for why, rows in found.items() for row in np.flatnonzero(rows).tolist()]
    for name, (column, undecodable) in ids.items():
        # An empty id would make one document of all texts without one.
        found = {"is not UTF-8": undecodable, "is empty": true(pc.equal(column, ""))}
        faults += [Fault(row, name, why) for why, rows in found.items() for row in np.flatnonzero(rows).tolist()]
    if task_type == "similarity":
        wrong = np.flatnonzero(~np.isfinite(scores_of(batch))).tolist()
        faults += [Fault(row, "score", "is null, NaN or infinite") for row in wrong]
    short = np.flatnonzero(count < required_negatives).tolist()
    faults += [Fault(row, "negative_*", f"has fewer than {required_negatives} texts") for row in short]
    return sorted(faults, key=lambda fault: fault.row)


def _decoded(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The column with nulls instead of invalid UTF-8, and a mask of these rows."""
    undecodable = np.zeros(len(column), dtype=bool)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in enumerate(column.view(pa.large_binary()).to_pylist()):
            undecodable[row] = value is not None and value.decode(errors="ignore").encode() != value
        column = pc.if_else(pa.array(undecodable), pa.scalar(None, column.type), column)
    return column, undecodable


def query_is_passage(batch: pa.RecordBatch) -> np.ndarray:
    """Return an ``(n,)`` mask of good rows whose query equals the passage after normalisation: almost no signal."""
    raw = [without_instruction(text) for text in text_column(batch, "query").to_pylist()]
    return same_form(pa.array(raw, type=pa.large_string()), text_column(batch, "passage"))


@dataclass(frozen=True)
class TextBatch:
    """Some rows of a file."""

    first_row: int  # within the file, from 0
    columns: dict[str, list[str | None]]  # query, positives and negatives in order, then ids; None for a missing one

    def __len__(self) -> int:
        return len(self.columns["query"])

    @property
    def passages(self) -> list[str]:
        """The positives of each row, line by line: two rows say the same only if all of them do."""
        names = document_columns([*self.columns]).positives
        return ["\n".join(filter(None, texts)) for texts in zip(*map(self.columns.get, names), strict=True)]


class PublishedFile:
    """One parquet file of a source, such as ``hf://datasets/OWNER/NAME/a.parquet``; open only while it is read.

    ``document_scores`` reads columns such as ``passage_score``, too.
    """

    def __init__(
        self,
        path: str | SourceFile,
        required_negatives: int = 0,
        task_type: str = "retrieval",
        document_scores: bool = False,
    ) -> None:
        if isinstance(path, str):
            path = RemoteFile(path) if "://" in path else Path(path)
        self.path, self.required_negatives, self.task_type = path, required_negatives, task_type
        with self._open() as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
        self.positives, self.negatives, self.ids = document_columns(schema.names)
        self.columns = ["query", *self.positives, *self.negatives, *self.ids]
        self.require(required_negatives)
        # Arrow cannot filter views.
        plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
        fields = [field.with_type(plain.get(field.type, field.type)) for field in schema]
        self.schema = pa.schema(fields, metadata=schema.metadata)
        for name in self.columns:
            self._check_text(name)
        self.scores: list[str] = []
        if task_type == "similarity":
            self._check_scores()
        elif document_scores:
            names = (f"{name}_score" for name in (*self.positives, *self.negatives))
            self.scores = [name for name in names if name in schema.names]
            for name in self.scores:
                self._check_numbers(name)
        self.num_rows = metadata.num_rows
        if not self.num_rows:
            raise UserError(f"{path}: the file has no rows; build it again or leave it out")
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.row_group_rows = [group.num_rows for group in groups]
        size = max(sum(group.total_byte_size for group in groups), 1)
        self.batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * self.num_rows // size))

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        buffer = _REMOTE_BUFFER_BYTES if isinstance(self.path, RemoteFile) else _BUFFER_BYTES
        with (
            opened(self.path) as handle,
            # Buffered, a column is read page by page; otherwise whole row groups are fetched first, and each published
            # file is a single one.
            pq.ParquetFile(handle, buffer_size=buffer, pre_buffer=False, page_checksum_verification=True) as parquet,
        ):
            yield parquet

    def require(self, negatives: int) -> None:
        """Refuse a file that has too few negative columns for its task type."""
        there, task_type = len(self.negatives), self.task_type
        if there < negatives:
            what = f"{self.path}: {there} negative columns, but {negatives} negatives are drawn for each row"
            remedy = f"write 'num_hard_negatives_{task_type}: {there}'"
            if there == 0 and task_type != "retrieval":
                remedy = f"{task_type} learns from nothing else: leave the source out of 'sources'"
            raise UserError(f"{what}; {remedy}, or add columns (training/mine.py finds negatives)")

    def _check_scores(self) -> None:
        if more := [*self.positives[1:], *self.negatives]:
            what = f"{self.path}: column {more[0]!r} has no use beside scores"
            raise UserError(f"{what}; take it out, or give the source another task_type than similarity")
        if "score" not in self.schema.names:
            what = f"{self.path}: column 'score' is missing; it has {', '.join(self.schema.names)}"
            raise UserError(f"{what}; add it, or give the source another task_type than similarity")
        self._check_numbers("score")

    def _check_numbers(self, name: str) -> None:
        kind = self.schema.field(name).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise UserError(f"{self.path}: column {name!r} holds {kind}, not numbers; convert it to float64")
        self.columns.append(name)

    def _check_text(self, name: str) -> None:
        count = self.schema.names.count(name)
        if count != 1:
            fault = "is there twice" if count else f"is missing; it has {', '.join(self.schema.names)}"
            raise UserError(f"{self.path}: column {name!r} {fault}")
        kind = self.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        # A column that holds only nulls has the type null.
        if kind not in (pa.string(), pa.large_string(), pa.null()):
            raise UserError(f"{self.path}: column {name!r} holds {kind}, not text; convert it to strings")

    def batches(self, batch_rows: int | None = None, raw: bool = False, skip_bad: bool = False) -> Iterator[TextBatch]:
        """Yield the rows in order, without instructions if ``raw``; a bad row is an error unless it is skipped."""
        row = 0
        for batch in self.record_batches(batch_rows):
            faults, rows = find_faults(batch, self.required_negatives, self.task_type), len(batch)
            if faults and not skip_bad:
                raise bad_row(self.path, row, faults[0])
            if faults:
                batch = batch.filter(pa.array(~np.isin(np.arange(rows), [fault.row for fault in faults])))
            columns = batch.to_pydict()
            if raw:
                columns["query"] = [without_instruction(text) for text in columns["query"]]
            yield TextBatch(row, columns)
            row += rows

    def record_batches(
        self,
        batch_rows: int | None = None,
        row_groups: tuple[int, int] | None = None,
        all_columns: bool = False,
        rows: tuple[int, int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield ``columns``, or all columns, unchecked, of a range of row groups, or of all, and of their rows."""
        columns = None if all_columns else self.columns
        groups = None if row_groups is None else list(range(*row_groups))
        with self._open() as parquet:
            most = min(batch_rows or _BATCH_ROWS, self.batch_rows)
            # The file stores a repeated text once and a batch every time: the sizes in its footer can be too small.
            if isinstance(self.path, RemoteFile):
                most = min(most, _REMOTE_BATCH_ROWS)
            else:
                probed = next(parquet.iter_batches(_PROBE_ROWS, row_groups=groups, columns=columns))
                most = min(most, max(1, _BATCH_BYTES * len(probed) // max(probed.nbytes, 1)))
            row, (first, last) = 0, rows or (0, self.num_rows)
            for batch in parquet.iter_batches(most, row_groups=groups, columns=columns):
                before, row = row, row + len(batch)
                if row <= first:
                    continue
                batch = batch.slice(max(first - before, 0), last - max(first, before))
                yield batch.cast(pa.schema([self.schema.field(name) for name in batch.schema.names]))
                if row >= last:
                    break

    def further_columns(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield other text columns of the file as ``large_string``."""
        for name in names:
            self._check_text(name)
        with self._open() as parquet:
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=list(names)):
                yield pa.record_batch({name: text_column(batch, name) for name in names})


def rows_table(
    queries: Sequence[str],
    passages: Sequence[str],
    negatives: Sequence[Sequence[str | None]] = (),
    **more: Sequence[str | None],
) -> pa.Table:
    """Return rows in the published format; negatives are columns, the hardest first."""
    columns = {"query": queries, "passage": passages}
    columns |= {f"negative_{number}": column for number, column in enumerate(negatives, start=1)}
    return pa.table({name: pa.array(values, type=pa.string()) for name, values in (columns | more).items()})


def columns_of(table: pa.Table) -> dict[str, list[Any]]:
    """Return the values of a table by column; values that ``datasets`` stored as JSON are decoded."""
    if "extension<arrow.json>" not in str(table.schema):
        return table.to_pydict()
    # Loaded only where needed: the import takes a second.
    from datasets import Dataset

    return Dataset(table)[:]


def write_parquet(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write tables of one schema to a file, whole or, without tables, not at all; return the number of rows."""
    tables, rows = iter(tables), 0
    first = next(tables, None)
    if first is None:
        return 0
    options = {"compression": "zstd", "write_page_checksum": True}
    with whole_file(path) as partial, pq.ParquetWriter(partial, first.schema, **options) as writer:
        for table in chain([first], tables):
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            rows += len(table)
    return rows
