"""Rows of JSON files, with every value as it stands there.

``datasets`` gives a column one type: a number among texts, or a text that looks like a number or a date, comes out as
something else than was written. Here each row is decoded alone, from lines that ``datasets`` keeps on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets

from training.common.errors import UserError, in_one_line

_ROWS_AT_ONCE = 1000
_MARK = "\ufeff"


@dataclass
class JsonRows:
    """The rows of JSON files: an object a line, or a file that is one list of objects.

    Attributes:
        files: Each file's name and lines, as ``datasets`` loads text.
        below: The key of the object under which the rows of a file lie; None if there is no such object.

    Raises:
        UserError: If something in a file is not a JSON object.
    """

    files: list[tuple[str, datasets.Dataset]]
    below: str | None = None
    _number: int = field(init=False)

    def __post_init__(self) -> None:
        # A faulty line is told before any work.
        self._number = sum(1 for _ in self._rows())

    def __len__(self) -> int:
        """Rows of all files."""
        return self._number

    @property
    def fingerprint(self) -> list[Any]:
        """Changes with the files."""
        return [[lines._fingerprint, len(lines)] for _, lines in self.files] + [self.below]

    def columns(self, wanted: Iterable[str]) -> list[str]:
        """The keys of the rows, read until all that are wanted are among them."""
        missing, found = set(wanted), dict[str, None]()
        for _, row in self._rows():
            found |= dict.fromkeys(row)
            missing -= row.keys()
            if not missing:
                break
        return list(found)

    def batches(self, columns: Iterable[str]) -> Iterator[tuple[list[str], list[list[Any]]]]:
        """Yields where some rows stand, and their values of each column; None where a row lacks it.

        Raises:
            UserError: If a line is not a JSON object.
        """
        columns, places, rows = list(columns), [], []
        for place, row in self._rows():
            places.append(place)
            rows.append(row)
            if len(rows) == _ROWS_AT_ONCE:
                yield places, [[each.get(name) for each in rows] for name in columns]
                places, rows = [], []
        if rows:
            yield places, [[each.get(name) for each in rows] for name in columns]

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, lines in self.files:
            if self.below is not None or _is_document(lines):
                yield from self._items(name, lines)
                continue
            for number, line in enumerate(_texts(lines), start=1):
                # Blank lines are allowed between rows.
                if line.strip():
                    yield f"{name}: line {number}", _object(f"{name}: line {number}", line)

    def _items(self, name: str, lines: datasets.Dataset) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a file that is one JSON value."""
        content = _decoded(name, "\n".join(_texts(lines)))
        if self.below is not None:
            content = content.get(self.below) if isinstance(content, dict) else None
        if not isinstance(content, list):
            raise UserError(f"{name}: expected a list of JSON objects; write one, or one object a line")
        for number, item in enumerate(content, start=1):
            if not isinstance(item, dict):
                raise UserError(f"{name}: item {number} is {str(item)[:100]!r}, not a JSON object; correct it")
            yield f"{name}: item {number}", item


def _texts(lines: datasets.Dataset) -> Iterator[str]:
    for batch in lines.iter(_ROWS_AT_ONCE):
        yield from batch["text"]


def _is_document(lines: datasets.Dataset) -> bool:
    first = next((line for line in _texts(lines) if line.strip()), "").removeprefix(_MARK).strip()
    return first.startswith("[") or first == "{"


def _object(where: str, line: str) -> dict[str, Any]:
    value = _decoded(where, line)
    if not isinstance(value, dict):
        raise UserError(f"{where} is {line.strip()[:100]!r}, not a JSON object; correct it")
    return value


def _decoded(where: str, text: str) -> Any:
    try:
        return json.loads(text.removeprefix(_MARK), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({in_one_line(error)}); correct it") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found
