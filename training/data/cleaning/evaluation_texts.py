"""The texts of evaluation sets: local files with named columns, or tasks of ``mteb`` by their names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from training.common.errors import UserError, in_one_line
from training.data.parquet import columns_of
from training.data.storage import identity

_KINDS = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
# A text longer than a block could not be read.
_CSV_BLOCK_BYTES = 1 << 24


class EvaluationSet(Protocol):
    """Where evaluation texts come from."""

    @property
    def name(self) -> str:
        """What reports call the set."""

    def version(self) -> Any:
        """JSON that changes when the texts do."""

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields the column and the text of each."""


@dataclass(frozen=True)
class EvaluationFile:
    """Columns of a local file; a line is a text in a file without columns (``.txt``)."""

    path: Path
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def version(self) -> Any:
        """Path, content and columns."""
        return [str(self.path.resolve()), *identity(self.path), list(self.columns)]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields the column and the text of each, row by row; a list of texts is so many texts.

        Raises:
            UserError: If the file cannot be read.
        """
        try:
            for record in _records(self.path, self.columns):
                for column in self.columns:
                    yield from ((column, text) for text in _strings(record.get(column)))
        except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: cannot be read ({in_one_line(error)}); write the file again") from None


def evaluation_file(argument: str) -> EvaluationFile:
    """Reads ``FILE:column,column`` and looks whether the columns are there.

    Raises:
        UserError: If the file is missing or empty, of an unknown kind, or lacks a column.
    """
    name, _, listed = (argument, "", "") if Path(argument).exists() else argument.rpartition(":")
    path, columns = Path(name or argument), tuple(column.strip() for column in listed.split(",") if column.strip())
    if not path.is_file():
        raise UserError(f"{path}: no such evaluation file; check the path (FILE:column,column)")
    if path.suffix not in _KINDS:
        raise UserError(f"{path}: an evaluation file is one of {', '.join(_KINDS)}; convert it")
    if not path.stat().st_size:
        raise UserError(f"{path}: the evaluation file is empty; download or write it again")
    if path.suffix == ".txt":
        if columns:
            raise UserError(f"{path}: a text file has no columns, one line is one text; leave out {listed!r}")
        return EvaluationFile(path, ("line",))
    try:
        there = _column_names(path)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({in_one_line(error)}); write the file again") from None
    if not columns:
        raise UserError(f"{path}: name the columns with texts ({path}:column,column); it has {', '.join(there)}")
    for column in columns:
        if column not in there:
            raise UserError(f"{path}: column {column!r} is missing; it has {', '.join(there)}")
    return EvaluationFile(path, columns)


def _column_names(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pq.read_schema(path).names
    if path.suffix == ".jsonl":
        return list(next(_json_lines(path), {}))
    return _open_csv(path, None).schema.names


def _records(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a file."""
    if path.suffix == ".txt":
        with path.open(encoding="utf-8") as lines:
            yield from ({"line": line} for line in lines)
    elif path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".parquet":
        with pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(columns=list(columns)):
                values = columns_of(pa.Table.from_batches([batch]))
                yield from (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))
    else:
        for batch in _open_csv(path, columns):
            yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            record = json.loads(line) if line.strip() else {}
            if not isinstance(record, dict):
                raise UserError(f"{path}: line {number} is no JSON object; write one object a line")
            if record:
                yield record


def _open_csv(path: Path, columns: Sequence[str] | None) -> pacsv.CSVStreamingReader:
    convert = pacsv.ConvertOptions()
    if columns:
        convert = pacsv.ConvertOptions(
            include_columns=list(columns), column_types={column: pa.string() for column in columns}
        )
    return pacsv.open_csv(
        path,
        pacsv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        pacsv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True),
        convert,
    )


def _strings(value: Any) -> Iterator[str]:
    """Yields the texts in a value: itself, those in a list of whatever depth, the content of the turns of a dialog."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        yield from _strings(value.get("content"))


# Attributes in which the kinds of tasks name the columns of their texts.
_TEXT_COLUMNS = (
    "input_column_name",
    "input1_column_name",
    "input2_column_name",
    "column_names",
    "text_column_name",
    "human_summaries_column_name",
    "machine_summaries_column_name",
)
_RETRIEVAL = ("corpus", "queries")
_RETRIEVAL_TEXTS = ("title", "text", "instruction")
# Columns of text that are not evaluation texts, where a task names no columns.
_NO_TEXTS = {"id", "_id", "query-id", "corpus-id", "lang", "language", "label", "labels", "label_text", "split"}


@dataclass(frozen=True)
class EvaluationTask:
    """A task of ``mteb``, loaded when its texts are asked for.

    Attributes:
        name: The task's name.
        revision: The revision of its data set.
    """

    name: str
    revision: str

    def version(self) -> Any:
        """Name and revision."""
        return [self.name, self.revision]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yields the column and the text of each, of the splits that are evaluated.

        Raises:
            UserError: If the data cannot be loaded.
        """
        (task,) = _get_tasks([self.name])
        try:
            task.load_data()
            # Some retrieval tasks load what mteb lays out anew before it evaluates them.
            convert = getattr(task, "convert_v1_dataset_format_to_v2", None)
            if convert is not None:
                convert(num_proc=None)
        except Exception as error:
            raise UserError(
                f"mteb task {self.name!r}: its data cannot be loaded ({in_one_line(error)}); "
                "download it first, or give its texts as a file"
            ) from None
        for where, dataset in _tables(task.dataset, list(task.eval_splits)):
            for column in _text_columns(task, where, dataset.column_names):
                label = f"{where}.{column}" if where else column
                for value in dataset[column]:
                    yield from ((label, text) for text in _strings(value))


def evaluation_tasks(names: Sequence[str]) -> list[EvaluationTask]:
    """The ``mteb`` tasks of these names; a task that is made of others is those.

    Raises:
        UserError: If ``mteb`` is not installed or there is no such task.
    """
    found: dict[str, EvaluationTask] = {}
    for task in _get_tasks(names):
        for part in getattr(task, "tasks", None) or [task]:
            metadata = part.metadata
            found[metadata.name] = EvaluationTask(metadata.name, str(metadata.revision))
    return list(found.values())


def _get_tasks(names: Sequence[str]) -> list[Any]:
    try:
        import mteb
    except ImportError as error:
        raise UserError(f"evaluation sets by mteb task name need mteb ({error}); pip install 'f2llm[eval]'") from None
    tasks = []
    for name in names:
        try:
            tasks += mteb.get_tasks(tasks=[name])
        except KeyError as error:
            reason = str(error.args[0] if error.args else error).removeprefix("KeyError: ")
            raise UserError(f"unknown mteb task {name!r} ({reason}); correct the name") from None
    return tasks


def _tables(data: Any, splits: Sequence[str], where: str = "") -> Iterable[tuple[str, Any]]:
    """Yields the tables in a task's data with the part of it that they are, ``corpus`` or ``queries`` if any.

    The data is nested by language subset, split and, for retrieval, part; not every task has every level.
    """
    if not isinstance(data, Mapping):
        yield where, data
        return
    parts = [key for key in _RETRIEVAL if key in data]
    if parts:
        for part in parts:
            yield from _tables(data[part], splits, part)
        return
    for key in [key for key in data if key in splits] or list(data):
        yield from _tables(data[key], splits, where)


def _text_columns(task: Any, where: str, columns: Sequence[str]) -> list[str]:
    if where in _RETRIEVAL:
        return [column for column in _RETRIEVAL_TEXTS if column in columns]
    named: list[str] = []
    for attribute in _TEXT_COLUMNS:
        value = getattr(task, attribute, None) or ()
        named += [value] if isinstance(value, str) else list(value)
    return [column for column in named if column in columns] or [
        column for column in columns if column not in _NO_TEXTS
    ]
