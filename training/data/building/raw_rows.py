"""Raw rows: one split of a data set that ``datasets`` loads, read row by row in the columns that a build file names.

``datasets`` gives a column one type, which turns a number among texts, or a text that looks like a number or a date,
into something else. Values of csv files are therefore read as texts, and each row of a JSON file is decoded alone, from
lines that ``datasets`` keeps on disk.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from pandas.errors import ParserWarning

from training.common.errors import UserError, in_one_line

# The names by which `datasets` loads files that are not laid out as a data set.
FILE_KINDS = ("arrow", "csv", "json", "parquet", "text")
# Messages of `datasets` and pandas about files without rows.
_NO_ROWS = ("corresponds to no data", "No columns to parse from file", "pass `features` or at least one example")
_BATCH_ROWS = 1000


def load_raw(where: str, dataset: str, folder: Path, *, split: str, **options: Any) -> datasets.Dataset | JsonRows:
    """Load one split of a data set; its rows stay on disk, memory-mapped.

    Args:
        where: The beginning of an error message.
        dataset: A name on the Hub, one of ``FILE_KINDS``, or a folder of data files or of ``Dataset.save_to_disk``.
        folder: What paths are relative to.
        split: The split.
        **options: Arguments of ``datasets.load_dataset``.
    """
    path = folder / dataset
    if dataset in FILE_KINDS and "data_files" not in options:
        raise UserError(f"{where}: dataset {dataset!r} needs the files to read; name them in 'data_files'")
    # A folder takes precedence over a data set of the same name on the Hub.
    is_folder = dataset not in FILE_KINDS and path.is_dir()
    if is_folder:
        dataset, folder = str(path), path
    try:
        if "data_files" in options and (is_folder or dataset in FILE_KINDS):
            options["data_files"] = _relative_to(folder, options["data_files"])
        if is_folder and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            return splits[split]
        return _load(dataset, split, options)
    except UserError as error:
        reason = str(error)
    # `datasets` can raise any exception on a corrupt file; some name the reason in their cause only.
    except Exception as error:
        cause = error.__cause__ or error
        reason = f"{in_one_line(cause) or type(cause).__name__}; check dataset, config, split, data_files, load_options"
        if isinstance(cause, StopIteration) or any(words in reason for words in _NO_ROWS):
            reason = "there are no rows in its files; check 'data_files' and 'split', and write the files again"
    raise UserError(f"{where}: cannot load split {split!r} of {dataset!r}: {reason}")


def _relative_to(folder: Path, files: str | Sequence[str]) -> list[str]:
    """Return the files with relative paths taken from a folder; addresses stay unchanged."""
    found = [file if "://" in file else str(folder / file) for file in ([files] if isinstance(files, str) else files)]
    for file in found:
        if "://" not in file and not glob(file, recursive=True):
            raise UserError(f"there is no file {file}; check data_files (a relative path starts at {folder})")
    return found


def _load(dataset: str, split: str, options: dict[str, Any]) -> datasets.Dataset | JsonRows:
    config = datasets.load_dataset_builder(dataset, **options).config
    if isinstance(config, JsonConfig):
        return JsonRows(config, split)
    if isinstance(config, CsvConfig):
        options = {"keep_default_na": False, "index_col": False, **options}
        with warnings.catch_warnings():
            # For a row with more fields than the header, pandas would make an index or drop the rest.
            warnings.simplefilter("error", ParserWarning)
            names = datasets.load_dataset(dataset, split=split, **{**options, "nrows": 1}).column_names
            options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
            return datasets.load_dataset(dataset, split=split, **options)
    return datasets.load_dataset(dataset, split=split, **options)


class JsonRows:
    """The rows of JSON files: one object per line, or a file that is one list of objects.

    Args:
        config: The files and their encoding, as ``datasets`` found them; its ``field`` is the key of the rows in a file
            that is one object.
        split: The split.
    """

    def __init__(self, config: JsonConfig, split: str) -> None:
        if split in config.data_files:
            # A local file of no bytes has no lines to load.
            names = [str(file) for file in config.data_files[split]]
            names = [name for name in names if not Path(name).is_file() or Path(name).stat().st_size]
            files = {name: ([name], "train") for name in names}
        else:
            # A part of a split, such as "train[:10]".
            files = {split: (dict(config.data_files), split)}
        # The encoding "utf-8-sig" is UTF-8 without the byte order mark that Windows writes.
        encoding = "utf-8-sig" if config.encoding == "utf-8" else config.encoding
        text = {"encoding": encoding, "encoding_errors": config.encoding_errors}
        text["features"] = datasets.Features({"text": datasets.Value("string")})
        self._lines = {
            name: datasets.load_dataset("text", data_files=data_files, split=part, **text)
            for name, (data_files, part) in files.items()
        }
        self._field, self._number = config.field, 0
        # Decode every line now, to report a faulty one before any work.
        columns: dict[str, None] = {}
        for _, row in self:
            self._number += 1
            columns |= dict.fromkeys(row)
        if not columns:
            raise StopIteration
        self.schema = pa.schema([(name, pa.json_()) for name in columns])
        # Changes with the files.
        self.fingerprint = [[lines._fingerprint, len(lines)] for lines in self._lines.values()] + [self._field]

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the location of each row (file and line), and the row."""
        for name, lines in self._lines.items():
            first = next((line for line in _texts(lines) if line.strip()), "").strip()
            if self._field is None and not first.startswith("[") and first != "{":
                numbered = ((f"{name}: line {number}", line) for number, line in enumerate(_texts(lines), start=1))
                rows = ((location, _decoded(location, line)) for location, line in numbered if line.strip())
            else:
                content = _decoded(name, "\n".join(_texts(lines)))
                if self._field is not None:
                    content = content.get(self._field) if isinstance(content, dict) else None
                if not isinstance(content, list):
                    raise UserError(f"{name}: expected a list of JSON objects; write one, or one object per line")
                rows = ((f"{name}: item {number}", item) for number, item in enumerate(content, start=1))
            for location, row in rows:
                if not isinstance(row, dict):
                    raise UserError(f"{location} is {str(row)[:100]!r}, not a JSON object; correct it")
                yield location, row


def _texts(lines: datasets.Dataset) -> Iterator[str]:
    for batch in lines.iter(_BATCH_ROWS):
        yield from batch["text"]


def _decoded(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({in_one_line(error)}); correct it") from None


@dataclass
class RawRows:
    """The rows of a data set, with the columns named by their role.

    Iterating yields the number and the columns of each row that has everything it must have; the others are counted.
    ``columns`` has the column to read for each role: its name, a path into nested columns (``answers.text``; of a list
    the first item), or for texts a list of them, to be joined by newlines.
    """

    data: datasets.Dataset | JsonRows
    columns: Mapping[str, str | Sequence[str]]
    where: str  # the beginning of an error message
    texts: Sequence[str] = ()  # roles that must be texts, neither missing nor blank
    values: Sequence[str] = ()  # roles that must not be missing
    optional: Sequence[str] = ()  # roles that may be missing or not be among the columns; they are None then
    name: str = ""  # of the source, for the keys of draws
    seed: int = 0  # of draws
    quarantine: bool = False  # leave out and count rows with a value of another type instead of text: no error
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out in the last iteration, by reason

    def __post_init__(self) -> None:
        schema = self.data.schema if isinstance(self.data, JsonRows) else self.data.data.schema
        self._paths: dict[str, list[tuple[str, ...]]] = {}
        for role, named in self.columns.items():
            columns = [named] if isinstance(named, str) else named
            # The name of a column may contain dots.
            paths = [(column,) if column in schema.names else tuple(column.split(".")) for column in columns]
            for column, path in zip(columns, paths, strict=True):
                if path[0] not in schema.names or not _has(schema.field(path[0]).type, path[1:]):
                    raise UserError(
                        f"{self.where}: there is no column {column!r} for {role!r}; correct 'columns', "
                        f"the data has {', '.join(schema.names)}"
                    )
            self._paths[role] = paths
        self._location = ""  # of the current row

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self.dropped.clear()
        for number, (location, row) in enumerate(self._rows()):
            self._location = location
            values = {role: self._value(role, row) for role in (*self.texts, *self.values, *self.optional)}
            fault = next(filter(None, (self._fault(role, value) for role, value in values.items())), None)
            if fault is None:
                yield number, values
            else:
                self.dropped[fault] += 1

    def refuse(self, role: str, fault: str) -> UserError:
        """Return the error for a faulty column of the current row; ``fault`` says what to do."""
        return UserError(f"{self.where}: {self._location}, column {self.columns[role]!r} ({role}) {fault}")

    def not_text(self, role: str, value: Any, expected: str = "text") -> str:
        """Return the reason to count for a row with a value that is not text, or raise if such rows are errors."""
        if self.quarantine:
            return f"{role} is not text"
        remedy = "correct the row, name another column, or leave such rows out with 'on_bad_row: quarantine'"
        raise self.refuse(role, f"holds {repr(value)[:100]}, which is not {expected}; {remedy}")

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(self.data, JsonRows):
            yield from self.data
            return
        tops = dict.fromkeys(path[0] for paths in self._paths.values() for path in paths)
        # The default format decodes values by the features, which may differ from what is in the file.
        number = 0
        for batch in self.data.select_columns([*tops]).with_format(None).iter(_BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                yield f"row {number}", dict(zip(batch, values, strict=True))
                number += 1

    def _value(self, role: str, row: Mapping[str, Any]) -> Any:
        parts = [_walk(row, path) for path in self._paths.get(role, ())]
        if self._is_text(role):
            parts = [_first(part) for part in parts]
        if len(parts) < 2:
            return parts[0] if parts else None
        # Texts that are not missing, one per line; a value that is not text is refused.
        wrong = [part for part in parts if not isinstance(part, str | None)]
        if wrong or parts.count(None) == len(parts):
            return wrong[0] if wrong else None
        return "\n".join(text for text in parts if text and text.strip())

    def _is_text(self, role: str) -> bool:
        return role in self.texts or role in ("lang", "passage_lang")

    def _fault(self, role: str, value: Any) -> str | None:
        """Return why the current row is left out because of a value, if it is."""
        if value is None or (role not in self.texts and value == ""):
            return None if role in self.optional else f"{role} is missing"
        if self._is_text(role) and not is_text(value):
            return self.not_text(role, value)
        return f"{role} is blank" if role in self.texts and not value.strip() else None


def is_text(value: Any) -> bool:
    """Return whether a value is a text that can be encoded as UTF-8; half a surrogate pair of JSON cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _has(kind: pa.DataType, path: Sequence[str]) -> bool:
    """Return whether a type has nested fields; what JSON contains shows only in the rows."""
    if isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        return _has(kind.value_type, path)
    if not path or isinstance(kind, pa.BaseExtensionType):
        return True
    return pa.types.is_struct(kind) and kind.get_field_index(path[0]) >= 0 and _has(kind.field(path[0]).type, path[1:])


def _first(value: Any) -> Any:
    """Return the first item of a nested list, or None of an empty one."""
    while isinstance(value, list):
        value = value[0] if value else None
    return value


def _walk(value: Any, path: Sequence[str]) -> Any:
    """Return the value at the end of a path; of a JSON row without such a part, a value that is refused as text."""
    for step in path:
        value = _first(value)
        if value is None:
            return None
        if not isinstance(value, dict):
            return {f"without {step}": value}
        value = value.get(step)
    return value
