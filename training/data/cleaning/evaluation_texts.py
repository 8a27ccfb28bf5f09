"""The texts of evaluation sets: local files with named columns, or ``mteb`` tasks by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from training.common.errors import UserError, in_one_line
from training.data.published import columns_of
from training.data.storage import identity

_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
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
        for row in _read(self.path)[list(self.columns)].itertuples(index=False):
            for column, value in zip(self.columns, row, strict=True):
                yield from ((column, text) for text in _strings(value))


def evaluation_file(argument: str) -> EvaluationFile:
    """Parse ``FILE:column,column`` and check that the columns exist."""
    name, _, listed = (argument, "", "") if Path(argument).exists() else argument.rpartition(":")
    path, columns = Path(name or argument), tuple(column.strip() for column in listed.split(",") if column.strip())
    if not path.is_file():
        raise UserError(f"{path}: no such evaluation file; check the path (FILE:column,column)")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: an evaluation file is one of {', '.join(_SUFFIXES)}; convert it")
    there = list(_read(path))
    if not columns and path.suffix == ".txt":
        columns = ("line",)
    if not columns or not set(columns) <= set(there):
        wrong = f"lacks {', '.join(sorted(set(columns) - set(there)))}" if columns else "needs names of columns"
        raise UserError(f"{path}: {wrong}; its columns are {', '.join(there)} (write {path}:column,column)")
    return EvaluationFile(path, columns)


def _read(path: Path) -> pd.DataFrame:
    """Read a file; the lines of a ``.txt`` file are the column ``line``."""
    try:
        if path.suffix == ".parquet":
            return pd.DataFrame(columns_of(pq.read_table(path)))
        if path.suffix in (".csv", ".tsv"):
            # Texts such as "NA" and "0.50" stay as they are written.
            options = {"dtype": str, "na_filter": False, "index_col": False, "encoding": "utf-8-sig"}
            return pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", **options)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        if path.suffix == ".txt":
            return pd.DataFrame({"line": lines})
        return pd.DataFrame([dict(json.loads(line)) for line in lines if line.strip()])
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({in_one_line(error)}); write the file again") from None


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
            if convert := getattr(task, "convert_v1_dataset_format_to_v2", None):
                convert(num_proc=None)
        # Loading runs the code of the task.
        except Exception as error:
            what = f"mteb task {self.name!r}: its data cannot be loaded ({in_one_line(error)})"
            raise UserError(f"{what}; download it first, or give its texts as a file") from None
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
    return list(dict.fromkeys(EvaluationTask(part.metadata.name, str(part.metadata.revision)) for part in parts))


def _get_tasks(names: Sequence[str]) -> Sequence[Any]:
    try:
        # Optional package.
        import mteb

        return mteb.get_tasks(tasks=list(names))
    except ImportError as error:
        raise UserError(f"evaluation sets by mteb task name need mteb ({error}); pip install 'f2llm[eval]'") from None
    except KeyError as error:
        raise UserError(f"unknown mteb task ({in_one_line(error)}); correct the name") from None


def _tables(data: Any, splits: Sequence[str], part: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tables of a task, which are nested by subset, split and part, with their part if they have one."""
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
    values = [getattr(task, attribute, None) or () for attribute in _TEXT_COLUMNS]
    named = [column for value in values for column in ([value] if isinstance(value, str) else value)]
    return [column for column in named if column in columns] or [name for name in columns if name not in _NO_TEXTS]
