"""Raw rows: one split of a data set that ``datasets`` loads, read row by row in the columns that a build file names.

``datasets`` gives a column one type, which turns a number among texts, or a text that looks like a number or a date,
into something else. Values of csv files are therefore read as texts, and each row of a JSON file is decoded alone, from
lines that ``datasets`` keeps on disk.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import escape, glob
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
_BYTE_ORDER_MARK = "\ufeff"


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
            return _saved(path, split)
        return _load(dataset, split, options)
    except UserError as error:
        reason = f": {error}"
    # `datasets` can raise any exception on a corrupt file.
    except Exception as error:
        reason = f" ({_reason(error)})"
    raise UserError(f"{where}: cannot load split {split!r} of {dataset!r}{reason}")


def _reason(error: Exception) -> str:
    # "An error occurred while generating the dataset" has the reason in its cause.
    cause = error.__cause__ or error
    message = in_one_line(cause) or type(cause).__name__
    if isinstance(cause, StopIteration) or any(words in message for words in _NO_ROWS):
        return "there are no rows in its files; check 'data_files' and 'split', and write the files again"
    if "Dataset scripts are no longer supported" in message:
        return f"{message}: save its rows as parquet, jsonl or csv, and name these files"
    return f"{message}; check dataset, config, split, data_files and load_options"


def _load(dataset: str, split: str, options: dict[str, Any]) -> datasets.Dataset | JsonRows:
    config = datasets.load_dataset_builder(dataset, **options).config
    if isinstance(config, JsonConfig):
        return _json_rows(config, split)
    if not isinstance(config, CsvConfig) or config.features is not None:
        return datasets.load_dataset(dataset, split=split, **options)
    options = {"keep_default_na": False, "index_col": False, **options}
    with warnings.catch_warnings():
        # For a row with more fields than the header, pandas would make an index or drop the rest.
        warnings.simplefilter("error", ParserWarning)
        names = datasets.load_dataset(dataset, split=split, **{**options, "nrows": 1}).column_names
        options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
        return datasets.load_dataset(dataset, split=split, **options)


def _json_rows(config: JsonConfig, split: str) -> JsonRows:
    def lines(files: Any, split: str) -> datasets.Dataset:
        text = {"encoding": config.encoding, "encoding_errors": config.encoding_errors}
        text["features"] = datasets.Features({"text": datasets.Value("string")})
        return datasets.load_dataset("text", data_files=files, split=split, **text)

    def literal(file: str) -> str:
        return escape(file) if Path(file).is_file() else file

    if split not in config.data_files:
        # A part of a split, such as "train[:10]".
        files = {part: [literal(file) for file in named] for part, named in config.data_files.items()}
        return JsonRows([(split, lines(files, split))], config.field)
    files = [file for file in config.data_files[split] if not Path(file).is_file() or Path(file).stat().st_size]
    if not files:
        raise StopIteration
    return JsonRows([(str(file), lines([literal(file)], "train")) for file in files], config.field)


def _saved(path: Path, split: str) -> datasets.Dataset:
    """Load what ``save_to_disk`` wrote: one data set, or one per split."""
    loaded = datasets.load_from_disk(path)
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if split not in splits:
        raise UserError(f"there is no split {split!r} in {path}; it has {', '.join(splits)}")
    return splits[split]


def _relative_to(folder: Path, files: str | Sequence[str]) -> list[str]:
    """Return the files with relative paths taken from a folder; addresses stay unchanged."""
    found = [file if "://" in file else str(folder / file) for file in ([files] if isinstance(files, str) else files)]
    for file in found:
        if "://" not in file and not glob(file, recursive=True):
            raise UserError(f"there is no file {file}; check data_files (a relative path starts at {folder})")
    return found


class JsonRows:
    """The rows of JSON files: one object per line, or a file that is one list of objects.

    Args:
        files: The name and the lines of each file, as ``datasets`` loads text.
        below: The key under which the rows of a file are; None if the rows are not in an object.
    """

    def __init__(self, files: list[tuple[str, datasets.Dataset]], below: str | None = None) -> None:
        self._files, self._below = files, below
        # Decode every line now, to report a faulty one before any work.
        self._number = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._number

    @property
    def fingerprint(self) -> list[Any]:
        """Changes with the files."""
        return [[lines._fingerprint, len(lines)] for _, lines in self._files] + [self._below]

    def schema(self, wanted: Iterable[str]) -> pa.Schema:
        """Return the keys of the rows, read until all wanted ones are among them."""
        missing, found = set(wanted), dict[str, None]()
        for _, row in self:
            found |= dict.fromkeys(row)
            missing -= row.keys()
            if not missing:
                break
        return pa.schema([(name, pa.json_()) for name in found])

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the location of each row (file and line), and the row."""
        for name, lines in self._files:
            first = next((line for line in _texts(lines) if line.strip()), "").removeprefix(_BYTE_ORDER_MARK).strip()
            if self._below is None and not first.startswith("[") and first != "{":
                numbered = ((f"{name}: line {number}", line) for number, line in enumerate(_texts(lines), start=1))
                rows = ((location, _decoded(location, line)) for location, line in numbered if line.strip())
            else:
                content = _decoded(name, "\n".join(_texts(lines)))
                if self._below is not None:
                    content = content.get(self._below) if isinstance(content, dict) else None
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
        return json.loads(text.removeprefix(_BYTE_ORDER_MARK), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({in_one_line(error)}); correct it") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"key {repeated[0]!r} occurs twice")
    return dict(pairs)


class RawRows:
    """The rows of a data set, with the columns named by their role.

    Iterating yields the number and the columns of each row that has everything it must have; the others are counted.

    Args:
        data: What was loaded.
        columns: The column to read for each role: its name, a path into nested columns (``answers.text``; of a list
            the first item), or for texts a list of them, to be joined by newlines.
        where: The beginning of an error message.
        texts: Roles that must be texts, neither missing nor blank.
        values: Roles that must not be missing.
        optional: Roles that may be missing or not be among ``columns``; they are None then.
        name: The name of the source, for the keys of draws.
        seed: The seed of draws.
        quarantine: Leave out and count rows with a value of another type instead of text, instead of raising an error.

    Attributes:
        dropped: The number of rows left out in the last iteration, by reason.
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
        self._text_roles = self._texts | {"lang", "passage_lang"}
        self._roles = (*texts, *values, *optional)
        named = {role: [column] if isinstance(column, str) else column for role, column in columns.items()}
        tops = [column.split(".")[0] for all_of in named.values() for column in all_of]
        schema = data.schema(tops) if isinstance(data, JsonRows) else data.data.schema
        self._paths = {role: [self._path(schema, role, column) for column in all_of] for role, all_of in named.items()}
        self._tops = list(dict.fromkeys(path[0] for paths in self._paths.values() for path in paths))
        # Of the current row.
        self._location = ""

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self.dropped.clear()
        for number, (location, row) in enumerate(self._rows()):
            self._location = location
            values = {role: self._value(role, row) for role in self._roles}
            fault = self._fault(values)
            if fault is None:
                yield number, values
            else:
                self.dropped[fault] += 1

    def refuse(self, role: str, fault: str) -> UserError:
        """Return the error for a faulty column of the current row; ``fault`` says what to do."""
        return UserError(f"{self._where}: {self._location}, column {self.columns[role]!r} ({role}) {fault}")

    def refuse_or_count(self, role: str, fault: str, remedy: str) -> str:
        """Return the reason to count for a row with a value that is not text, or raise if such rows are errors."""
        if not self._quarantine:
            raise self.refuse(role, f"{fault}; {remedy}, or leave such rows out with 'on_bad_row: quarantine'")
        return f"{role} is not text"

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(self._data, JsonRows):
            yield from self._data
            return
        number = 0
        # The default format decodes values by the features, which may differ from what is in the file.
        for batch in self._data.select_columns(self._tops).with_format(None).iter(_BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                yield f"row {number}", dict(zip(batch, values, strict=True))
                number += 1

    def _path(self, schema: pa.Schema, role: str, column: str) -> tuple[str, ...]:
        """Return the steps to a column, whose own name may contain dots."""
        path = (column,) if column in schema.names else tuple(column.split("."))
        if path[0] not in schema.names or not _has(schema.field(path[0]).type, path[1:]):
            raise UserError(
                f"{self._where}: there is no column {column!r} for {role!r}; correct 'columns', "
                f"the data has {', '.join(schema.names)}"
            )
        return path

    def _value(self, role: str, row: Mapping[str, Any]) -> Any:
        if role not in self._paths:
            return None
        parts = [_walk(row.get(top), steps) for top, *steps in self._paths[role]]
        if role in self._text_roles:
            parts = [_first(part) for part in parts]
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _fault(self, values: Mapping[str, Any]) -> str | None:
        """Return why the current row is left out, if it is."""
        for role, value in values.items():
            if value is None or (role not in self._texts and value == ""):
                if role in self._required:
                    return f"{role} is missing"
            elif role in self._text_roles:
                if not is_text(value):
                    kind = "half a surrogate pair" if isinstance(value, str) else type(value).__name__
                    shown = f"holds {repr(value)[:100]}, which is {kind}, not text"
                    return self.refuse_or_count(role, shown, "correct the row or name another column")
                if role in self._texts and not value.strip():
                    return f"{role} is blank"
        return None


def is_text(value: Any) -> bool:
    """Return whether a value is a text that can be encoded as UTF-8; half a surrogate pair of JSON cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _has(kind: pa.DataType, path: Sequence[str]) -> bool:
    """Return whether a type has nested fields; what JSON contains shows only in the rows."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
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


def _joined(texts: Sequence[Any]) -> Any:
    """Return the texts that are not missing, one per line; None if all are missing; else a value that is not text."""
    if all(text is None for text in texts):
        return None
    wrong = [text for text in texts if text is not None and not isinstance(text, str)]
    return wrong[0] if wrong else "\n".join(text for text in texts if text and text.strip())
