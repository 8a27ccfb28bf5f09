"""Bad rows of the published format: which they are and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.common.errors import UserError
from training.data.cleaning.normalise import form_keys, same_form
from training.data.instructions import without_instruction

# No text of the published data comes near: what is longer is a broken dump rather than a document.
MOST_CHARACTERS = 1_000_000


class Fault(NamedTuple):
    """What is wrong with one row.

    Attributes:
        row: Number of the row within the batch.
        column: Name of the column.
        reason: A few words that follow the name of the column, such as "is null".
    """

    row: int
    column: str
    reason: str


def bad_row(path: object, first_row: int, fault: Fault, remedy: str = "correct or drop the row") -> UserError:
    """The error of a bad row, where bad rows are errors.

    Args:
        path: The file.
        first_row: Number of the batch's first row within the file.
        fault: What is wrong.
        remedy: What to do; the caller knows whether bad rows may be put aside.
    """
    return UserError(f"{path}: row {first_row + fault.row}, column {fault.column!r} {fault.reason}", remedy)


def text_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column as ``large_string``, whatever text type it has in the file."""
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_string())


def find_faults(batch: pa.RecordBatch, negatives: Sequence[str], required_negatives: int) -> list[Fault]:
    """Every fault of every row of a batch, by row.

    Args:
        batch: Columns ``query``, ``passage`` and negatives.
        negatives: Names of the negative columns, which may hold nulls.
        required_negatives: Negatives that a row must have.
    """
    faults: list[Fault] = []
    count = np.zeros(len(batch), dtype=np.int64)
    passage = keys = None
    for name in ("query", "passage", *negatives):
        column, undecodable = _decoded(text_column(batch, name))
        missing = np.asarray(pc.is_null(column)) & ~undecodable
        found = {"is not UTF-8": undecodable}
        if name in negatives:
            count += ~missing
            equal = np.asarray(pc.fill_null(pc.equal(column, passage), False))
            found["equals column 'passage'"] = equal
            found["is column 'passage' in another spelling"] = same_form(column, passage, keys) & ~equal
        else:
            found["is null"] = missing
        length = pc.utf8_length(column)
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
        found["is empty"] = np.asarray(pc.fill_null(blank, False))
        found[f"has more than {MOST_CHARACTERS:,} characters"] = np.asarray(
            pc.fill_null(pc.greater(length, MOST_CHARACTERS), False)
        )
        if name == "passage":
            passage, keys = column, form_keys(column) if negatives else None
        faults += [Fault(row, name, why) for why, rows in found.items() for row in np.flatnonzero(rows).tolist()]
    short = np.flatnonzero(count < required_negatives).tolist()
    faults += [Fault(row, "negative_*", f"has fewer than {required_negatives} texts") for row in short]
    return sorted(faults, key=lambda fault: fault.row)


def query_is_passage(batch: pa.RecordBatch) -> np.ndarray:
    """``(n,)`` whether the query of a row is its passage, in whatever spelling: such a row teaches next to nothing.

    Args:
        batch: Columns ``query`` and ``passage`` of good rows.
    """
    query, passage = (text_column(batch, name) for name in ("query", "passage"))
    # Published files may carry the instruction in the text already.
    raw = pa.array([without_instruction(text) for text in query.to_pylist()], type=pa.large_string())
    return same_form(raw, passage)


def _decoded(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The column with null where its bytes are no UTF-8, and a mask of these rows."""
    undecodable = np.zeros(len(column), dtype=bool)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        undecodable[list(_undecodable_rows(column))] = True
        column = pc.if_else(pa.array(undecodable), pa.scalar(None, column.type), column)
    return column, undecodable


def _undecodable_rows(column: pa.Array) -> Iterator[int]:
    for row, value in enumerate(column.view(pa.large_binary())):
        try:
            (value.as_py() or b"").decode()
        except UnicodeDecodeError:
            yield row
