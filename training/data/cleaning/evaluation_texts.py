"""The texts of evaluation sets: local files with named columns, or ``mteb`` tasks by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from training.common.errors import UserError, in_one_line
from training.data.published import columns_of
from training.data.storage import identity

_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
# A text longer than a block could not be read.
_CSV_BLOCK_BYTES = 1 << 24
# Attributes in which the kinds of mteb tasks name their text columns.
_TEXT_COLUMNS = (
    *("input_column_name", "input1_column_name", "input2_column_name", "column_names", "text_column_name"),
    *("human_summaries_column_name", "machine_summaries_column_name"),
)
_RETRIEVAL = ("corpus", "queries")
_RETRIEVAL_TEXTS = ("title", "text", "instruction")
# Columns that are not evaluation texts, if a task names no columns.
_NO_TEXTS = {"id", "_id", "query-id", "corpus-id", "lang", "language", "label", "labels", "label_text", "split"}


@dataclass(frozen=True)
class EvaluationFile:
    """Columns of a local file; each line of a ``.txt`` file is a text."""

    path: Path
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def version(self) -> Any:
        """Return path, content and columns."""
        return [str(self.path.resolve()), *identity(self.path), list(self.columns)]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield the column and the content of each text, row by row; a list holds several texts."""
        with _readable(self.path):
            for record in _records(self.path, self.columns):
                for column in self.columns:
                    yield from ((column, text) for text in _strings(record.get(column)))


def evaluation_file(argument: str) -> EvaluationFile:
    """Parse ``FILE:column,column`` and check that the columns exist."""
    name, _, listed = (argument, "", "") if Path(argument).exists() else argument.rpartition(":")
    path, columns = Path(name or argument), tuple(column.strip() for column in listed.split(",") if column.strip())
    if not path.is_file():
        raise UserError(f"{path}: no such evaluation file; check the path (FILE:column,column)")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: an evaluation file is one of {', '.join(_SUFFIXES)}; convert it")
    if not path.stat().st_size:
        raise UserError(f"{path}: the evaluation file is empty; download or write it again")
    if path.suffix == ".txt":
        if columns:
            raise UserError(f"{path}: a text file has no columns, one line is one text; leave out {listed!r}")
        return EvaluationFile(path, ("line",))
    with _readable(path):
        if path.suffix == ".parquet":
            there = pq.read_schema(path).names
        else:
            there = list(next(_json_lines(path), {})) if path.suffix == ".jsonl" else _open_csv(path).schema.names
    if not columns:
        raise UserError(f"{path}: name the columns with texts ({path}:column,column); it has {', '.join(there)}")
    for column in columns:
        if column not in there:
            raise UserError(f"{path}: column {column!r} is missing; it has {', '.join(there)}")
    return EvaluationFile(path, columns)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({in_one_line(error)}); write the file again") from None


def _records(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
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
                raise UserError(f"{path}: line {number} is not a JSON object; write one object per line")
            if record:
                yield record


def _open_csv(path: Path, columns: Sequence[str] = ()) -> pacsv.CSVStreamingReader:
    return pacsv.open_csv(
        path,
        pacsv.ReadOptions(block_size=_CSV_BLOCK_BYTES),
        pacsv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True),
        # Without types, "01" would be a number.
        pacsv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())),
    )


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts in a value: itself, those in nested lists, and the content of the turns of a dialog."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        yield from _strings(value.get("content"))


@dataclass(frozen=True)
class EvaluationTask:
    """An ``mteb`` task, loaded when its texts are needed; ``revision`` is that of its data set."""

    name: str
    revision: str

    def version(self) -> Any:
        """Return name and revision."""
        return [self.name, self.revision]

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield the column and the content of each text in the evaluated splits."""
        (task,) = _get_tasks([self.name])
        try:
            task.load_data()
            # mteb converts some retrieval tasks only before it evaluates them.
            convert = getattr(task, "convert_v1_dataset_format_to_v2", None)
            if convert is not None:
                convert(num_proc=None)
        # Loading runs the code of the task.
        except Exception as error:
            raise UserError(
                f"mteb task {self.name!r}: its data cannot be loaded ({in_one_line(error)}); "
                "download it first, or give its texts as a file"
            ) from None
        for part, table in _tables(task.dataset, list(task.eval_splits)):
            for column in _text_columns(task, part, table.column_names):
                label = f"{part}.{column}" if part else column
                for value in table[column]:
                    yield from ((label, text) for text in _strings(value))


# Both have a name for reports, a version that changes when the texts do, and yield (column, text).
EvaluationSet = EvaluationFile | EvaluationTask


def evaluation_tasks(names: Sequence[str]) -> list[EvaluationTask]:
    """Return the ``mteb`` tasks of these names; an aggregate task stands for its parts."""
    parts = [part for task in _get_tasks(names) for part in getattr(task, "tasks", None) or [task]]
    found = [EvaluationTask(part.metadata.name, str(part.metadata.revision)) for part in parts]
    return list({task.name: task for task in found}.values())


def _get_tasks(names: Sequence[str]) -> list[Any]:
    # An optional package.
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


def _tables(data: Any, splits: Sequence[str], part: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tables of a task with their part, ``corpus`` or ``queries`` if any.

    The data is nested by language subset, split and, for retrieval, part; not every task has every level.
    """
    if not isinstance(data, Mapping):
        yield part, data
    elif parts := [key for key in _RETRIEVAL if key in data]:
        for key in parts:
            yield from _tables(data[key], splits, key)
    else:
        for key in [key for key in data if key in splits] or list(data):
            yield from _tables(data[key], splits, part)


def _text_columns(task: Any, part: str, columns: Sequence[str]) -> list[str]:
    if part in _RETRIEVAL:
        return [column for column in _RETRIEVAL_TEXTS if column in columns]
    named: list[str] = []
    for attribute in _TEXT_COLUMNS:
        value = getattr(task, attribute, None) or ()
        named += [value] if isinstance(value, str) else list(value)
    others = [column for column in columns if column not in _NO_TEXTS]
    return [column for column in named if column in columns] or others
