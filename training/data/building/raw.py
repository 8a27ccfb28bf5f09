"""Raw rows: what was loaded, read row by row in the columns that a build file names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa

from training.common.errors import UserError
from training.data.building.json_rows import JsonRows

_BATCH_ROWS = 1000
# Roles that are texts, too, but may be missing.
_LANGUAGES = ("lang", "passage_lang")


class RawRows:
    """The rows of a data set, with a name of our own for each column that is read.

    Iterating yields the number and the columns of each row that has all it must have; the others are counted.

    Args:
        data: What was loaded.
        columns: For each role the column to read: its name, a path into nested columns (``answers.text``; of a list
            its first item), or for texts a list of them, to be joined by newlines.
        where: What an error names.
        texts: Roles that must be texts, neither missing nor blank.
        values: Roles that must not be missing, whatever they are.
        optional: Roles that may be missing or not be among ``columns``; they then are None.
        name: The name of the source, for the keys of draws.
        seed: The seed of draws.
        quarantine: Whether a row with something else than text where text belongs is left out and counted, rather
            than an error.

    Attributes:
        columns: As above.
        name: As above.
        seed: As above.
        dropped: How many rows were left out in the last iteration, for each reason.

    Raises:
        UserError: If a column is not there.
    """

    def __init__(
        self,
        data: datasets.Dataset | JsonRows,
        columns: Mapping[str, str | Sequence[str]],
        where: str,
        *,
        texts: Sequence[str] = (),
        values: Sequence[str] = (),
        optional: Sequence[str] = (),
        name: str = "",
        seed: int = 0,
        quarantine: bool = False,
    ) -> None:
        self.columns, self.name, self.seed = columns, name, seed
        self.dropped: Counter[str] = Counter()
        self._data, self._where, self._quarantine = data, where, quarantine
        self._texts, self._required = frozenset(texts), frozenset((*texts, *values))
        self._roles = (*texts, *values, *optional)
        named = {role: [column] if isinstance(column, str) else column for role, column in columns.items()}
        if isinstance(data, JsonRows):
            schema = None
            names = data.columns(column.split(".")[0] for all_of in named.values() for column in all_of)
        else:
            schema = data.data.schema
            names = schema.names
        self._paths = {
            role: [self._path(names, schema, role, column) for column in all_of] for role, all_of in named.items()
        }
        self._tops = list(dict.fromkeys(path[0] for paths in self._paths.values() for path in paths))
        self._first, self._places = 0, [""]

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self.dropped.clear()
        self._first = 0
        for places, batch in self._batches():
            self._places = places
            columns = [self._column(role, batch) for role in self._roles]
            for number, row in enumerate(zip(*columns, strict=True), start=self._first):
                fault = self._fault(number, row)
                if fault is None:
                    yield number, dict(zip(self._roles, row, strict=True))
                else:
                    self.dropped[fault] += 1
            self._first += len(self._places)

    def refuse(self, number: int, role: str, fault: str) -> UserError:
        """The error for a row of another kind than its source is said to have.

        Args:
            number: The number of the row, one of those that were read last.
            role: The role of the faulty column.
            fault: What is wrong with it and what to do.
        """
        place = self._places[number - self._first]
        return UserError(f"{self._where}: {place}, column {self.columns[role]!r} ({role}) {fault}")

    def refuse_or_count(self, number: int, role: str, fault: str, remedy: str) -> str:
        """Refuses a row whose value is something else than text; or says why it is left out.

        Args:
            number: The number of the row.
            role: The role of the faulty column.
            fault: What is wrong with it.
            remedy: What to do.

        Raises:
            UserError: If such rows are not left out.
        """
        if not self._quarantine:
            raise self.refuse(number, role, f"{fault}; {remedy}, or leave such rows out with 'on_bad_row: quarantine'")
        return f"{role} is not text"

    def _batches(self) -> Iterator[tuple[list[str], list[list[Any]]]]:
        """Yields where some rows stand, and the values of each top column."""
        if isinstance(self._data, JsonRows):
            yield from self._data.batches(self._tops)
            return
        # Decoded as the data set's features say: what lies in the file may be another form of it.
        first = 0
        for batch in self._data.select_columns(self._tops).with_format(None).iter(_BATCH_ROWS):
            columns = [batch[name] for name in self._tops]
            yield [f"row {first + number}" for number in range(len(columns[0]))], columns
            first += len(columns[0])

    def _path(self, names: Sequence[str], schema: pa.Schema | None, role: str, column: str) -> tuple[str, ...]:
        """The steps to a column, whose own name may have dots too."""
        path = (column,) if column in names else tuple(column.split("."))
        there = path[0] in names
        if there and schema is not None:
            kind = schema.field(path[0]).type
            for step in path[1:]:
                while kind is not None and _is_list(kind):
                    kind = kind.value_type
                if isinstance(kind, pa.BaseExtensionType):
                    # JSON: what is in it shows in the rows.
                    break
                found = kind is not None and pa.types.is_struct(kind) and kind.get_field_index(step) >= 0
                kind = kind.field(step).type if found else None
            there = kind is not None
        if not there:
            raise UserError(
                f"{self._where}: there is no column {column!r} for {role!r}; correct 'columns', "
                f"the data has {', '.join(names)}"
            )
        return path

    def _column(self, role: str, batch: Sequence[Sequence[Any]]) -> list[Any]:
        """The values of one role in a batch of rows."""
        if role not in self._paths:
            return [None] * len(self._places)
        is_text = role in self._texts or role in _LANGUAGES
        parts = []
        for path in self._paths[role]:
            values = [_walk(value, path[1:]) for value in batch[self._tops.index(path[0])]]
            parts.append([_first(value) for value in values] if is_text else values)
        return parts[0] if len(parts) == 1 else [_joined(texts) for texts in zip(*parts, strict=True)]

    def _fault(self, number: int, row: Sequence[Any]) -> str | None:
        """Why a row is left out, if it is."""
        for role, value in zip(self._roles, row, strict=True):
            if value is None or (role not in self._texts and value == ""):
                if role in self._required:
                    return f"{role} is missing"
            elif role in self._texts or role in _LANGUAGES:
                if not is_text(value):
                    kind = "half a surrogate pair" if isinstance(value, str) else type(value).__name__
                    shown = f"holds {repr(value)[:100]}, which is {kind}, not text"
                    return self.refuse_or_count(number, role, shown, "correct the row or name another column")
                if role in self._texts and not value.strip():
                    return f"{role} is blank"
        return None


def is_text(value: Any) -> bool:
    """Whether a value is a text that can be written as UTF-8; half of a surrogate pair of JSON cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _first(value: Any) -> Any:
    """The first item of a list, however deep; None of an empty one."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def _walk(value: Any, path: Sequence[str]) -> Any:
    """The value at the end of a path; in JSON a row may hold something that has no such part."""
    for step in path:
        value = _first(value)
        if value is None:
            return None
        if not isinstance(value, dict):
            return {f"without {step}": value}
        value = value.get(step)
    return value


def _joined(texts: Sequence[Any]) -> Any:
    """The texts that are there, a line each; None if all are missing; the first that is not text, if there is one."""
    if all(text is None for text in texts):
        return None
    wrong = [text for text in texts if text is not None and not isinstance(text, str)]
    return wrong[0] if wrong else "\n".join(text for text in texts if text and text.strip())
