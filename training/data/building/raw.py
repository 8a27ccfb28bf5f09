"""Raw data: whatever ``datasets`` loads, read row by row in the columns that a build file names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from training.errors import UserError, in_one_line

__all__ = ["FILE_KINDS", "RawRows", "load_raw"]

# The names by which `datasets` loads files that are not laid out as a data set.
FILE_KINDS = ("arrow", "csv", "json", "parquet", "text")
_BATCH_ROWS = 1000
# Roles that are texts, too, but may be missing.
_LANGUAGES = ("lang", "passage_lang")


def load_raw(where: str, dataset: str, folder: Path, **options: Any) -> datasets.Dataset:
    """Loads one split of a data set; its rows stay on disk, memory-mapped.

    Args:
        where: What an error names.
        dataset: A name on the Hub, one of ``FILE_KINDS``, or a folder: of data files, or of ``Dataset.save_to_disk``.
        folder: What paths are relative to.
        **options: Arguments of ``datasets.load_dataset``.

    Raises:
        UserError: If it cannot be loaded.
    """
    split, path = options.pop("split"), folder / dataset
    if dataset in FILE_KINDS:
        if "data_files" not in options:
            raise UserError(f"{where}: dataset {dataset!r} needs the files to read; name them in 'data_files'")
        options["data_files"] = _beside(folder, options["data_files"])
    elif path.is_dir():
        # Of a folder beside the build file and a set on the Hub of one name, the folder is meant.
        dataset = str(path)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(where, path, split)
        return datasets.load_dataset(dataset, split=split, **options)
    except (datasets.exceptions.DatasetsError, LookupError, OSError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        # "An error occurred while generating the dataset" has the reason in its cause.
        reason = in_one_line(error.__cause__ or error)
        raise UserError(
            f"{where}: cannot load split {split!r} of {dataset!r} ({reason}); "
            "check dataset, config, split, data_files and load_options"
        ) from None


def _saved(where: str, path: Path, split: str) -> datasets.Dataset:
    """What ``save_to_disk`` left: one data set, or one for each split."""
    loaded = datasets.load_from_disk(path)
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if split not in splits:
        raise UserError(f"{where}: there is no split {split!r} in {path}; it has {', '.join(splits)}")
    return splits[split]


def _beside(folder: Path, files: str | Sequence[str]) -> list[str]:
    """The files with relative paths taken from a folder; addresses stay as they are."""
    return [file if "://" in file else str(folder / file) for file in ([files] if isinstance(files, str) else files)]


class RawRows:
    """The rows of a data set, with a name of our own for each column that is read.

    Iterating yields the number and the columns of each row that has all it must have; the others are counted.

    Args:
        dataset: The data set.
        columns: For each role the column to read: its name, a path into nested columns (``answers.text``; of a list
            its first item), or for texts a list of them, to be joined by newlines.
        where: What an error names.
        texts: Roles that must be texts, neither missing nor blank.
        values: Roles that must not be missing, whatever they are.
        optional: Roles that may be missing or not be among ``columns``; they then are None.
        name: The name of the source, for the keys of draws.
        seed: The seed of draws.

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
        dataset: datasets.Dataset,
        columns: Mapping[str, str | Sequence[str]],
        where: str,
        *,
        texts: Sequence[str] = (),
        values: Sequence[str] = (),
        optional: Sequence[str] = (),
        name: str = "",
        seed: int = 0,
    ) -> None:
        self.columns, self.name, self.seed = columns, name, seed
        self.dropped: Counter[str] = Counter()
        self._where, self._texts, self._required = where, frozenset(texts), frozenset((*texts, *values))
        self._roles = (*texts, *values, *optional)
        schema = dataset.data.schema
        self._paths = {
            role: [self._path(schema, role, column) for column in ([named] if isinstance(named, str) else named)]
            for role, named in columns.items()
        }
        tops = dict.fromkeys(path[0] for paths in self._paths.values() for path in paths)
        self._dataset = dataset.select_columns(list(tops)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self.dropped.clear()
        first = 0
        for table in self._dataset.iter(_BATCH_ROWS):
            columns = [self._column(role, table, first) for role in self._roles]
            for number, row in enumerate(zip(*columns, strict=True), start=first):
                fault = self._fault(row)
                if fault is None:
                    yield number, dict(zip(self._roles, row, strict=True))
                else:
                    self.dropped[fault] += 1
            first += len(table)

    def refuse(self, number: int, role: str, fault: str) -> UserError:
        """The error for a row that is none of the kind its source is said to be of.

        Args:
            number: The number of the row.
            role: The role of the faulty column.
            fault: What is wrong with it and what to do.
        """
        return UserError(f"{self._where}: row {number}, column {self.columns[role]!r} ({role}) {fault}")

    def _path(self, schema: pa.Schema, role: str, column: str) -> tuple[str, ...]:
        """The steps to a column, whose own name may have dots too."""
        path = (column,) if column in schema.names else tuple(column.split("."))
        kind = schema.field(path[0]).type if path[0] in schema.names else None
        for step in path[1:]:
            while kind is not None and _is_list(kind):
                kind = kind.value_type
            found = kind is not None and pa.types.is_struct(kind) and kind.get_field_index(step) >= 0
            kind = kind.field(step).type if found else None
        if kind is None:
            raise UserError(
                f"{self._where}: there is no column {column!r} for {role!r}; correct 'columns', "
                f"the data has {', '.join(schema.names)}"
            )
        return path

    def _column(self, role: str, table: pa.Table, first: int) -> list[Any]:
        """The values of one role in a batch of rows."""
        if role not in self._paths:
            return [None] * len(table)
        is_text = role in self._texts or role in _LANGUAGES
        parts = []
        for path in self._paths[role]:
            values = [_walk(value, path[1:]) for value in table.column(path[0]).to_pylist()]
            parts.append([_first(value) for value in values] if is_text else values)
            if is_text:
                self._check_texts(role, parts[-1], first)
        return parts[0] if len(parts) == 1 else [_joined(texts) for texts in zip(*parts, strict=True)]

    def _check_texts(self, role: str, values: Sequence[Any], first: int) -> None:
        for number, value in enumerate(values, start=first):
            if value is not None and not isinstance(value, str):
                raise self.refuse(number, role, f"holds {str(value)[:100]!r}, which is no text; name another column")

    def _fault(self, row: Sequence[Any]) -> str | None:
        """Why a row is left out, if it is."""
        for role, value in zip(self._roles, row, strict=True):
            if role in self._required and value is None:
                return f"{role} is missing"
            if role in self._texts and not value.strip():
                return f"{role} is blank"
        return None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _first(value: Any) -> Any:
    """The first item of a list, however deep; None of an empty one."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def _walk(value: Any, path: Sequence[str]) -> Any:
    for step in path:
        value = _first(value)
        value = None if value is None else value[step]
    return value


def _joined(texts: Sequence[str | None]) -> str | None:
    """The texts that are there, a line each; None if all are missing."""
    if all(text is None for text in texts):
        return None
    return "\n".join(text for text in texts if text and text.strip())
