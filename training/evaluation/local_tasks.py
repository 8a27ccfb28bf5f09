"""mteb tasks over local parquet files, so that mteb itself runs them without a network."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from langcodes import Language
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata

from training.errors import UserError
from training.evaluation.pairs import read_texts

__all__ = ["cldr_tasks", "labelled_tasks", "pair_tasks"]

SPLIT = "test"
_LANGUAGE = ("lang", "script")


class LocalRetrieval(AbsTaskRetrieval):
    """Finding the passage of each query."""

    def load_data(self, **_: Any) -> None:
        """Nothing to do: the data came with the task."""


class LocalBitextMining(AbsTaskBitextMining):
    """Finding the translation of each text."""

    def load_data(self, **_: Any) -> None:
        """Nothing to do: the data came with the task."""


class LocalClassification(AbsTaskClassification):
    """Telling the label of each text."""

    def load_data(self, **_: Any) -> None:
        """Nothing to do: the data came with the task."""


class LocalClustering(AbsTaskClustering):
    """Grouping texts by label."""

    max_fraction_of_documents_to_embed = None

    def load_data(self, **_: Any) -> None:
        """Nothing to do: the data came with the task."""


def _code(language: str, script: str) -> str:
    return f"{Language.get(language).to_alpha3()}-{script}"


def _task(
    kind: type[AbsTask], name: str, task_type: str, metric: str, path: Path, languages: Any, data: Any
) -> AbsTask:
    metadata = TaskMetadata(
        name=name,
        description=f"Local data: {path.name}",
        # Results of other contents of the same file are other results.
        dataset={"path": str(path), "revision": hashlib.sha256(path.read_bytes()).hexdigest()[:16]},
        type=task_type,
        category="t2c" if task_type in ("Classification", "Clustering") else "t2t",
        eval_splits=[SPLIT],
        eval_langs=languages,
        main_score=metric,
    )
    task = type(name, (kind,), {"metadata": metadata})()
    task.dataset, task.data_loaded = data, True
    return task


def _subsets(columns: dict[str, list[Any]]) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
    rows = defaultdict(list)
    size = len(columns["query"])
    if "lang" not in columns:
        return {"default": list(range(size))}, {"default": ["und-Zyyy"]}
    scripts = columns.get("script", ["Zyyy"] * size)
    codes = {}
    for row, (language, script) in enumerate(zip(columns["lang"], scripts, strict=True)):
        name = _code(language, script)
        rows[name].append(row)
        codes[name] = [name]
    return dict(rows), codes


def _retrieval_split(columns: dict[str, list[Any]], rows: list[int], ids: dict[str, str], corpus: Dataset) -> dict:
    return {
        "corpus": corpus,
        "queries": Dataset.from_dict({"id": [f"q{r}" for r in rows], "text": [columns["query"][r] for r in rows]}),
        "relevant_docs": {f"q{row}": {ids[columns["passage"][row]]: 1} for row in rows},
        "top_ranked": None,
    }


def pair_tasks(path: Path | str, name: str, candidates: Path | str | None = None) -> list[AbsTask]:
    """Retrieval and bitext mining over a parquet file of pairs, the published format included.

    Args:
        path: Has the columns query and passage, and may have lang and script, which make subsets.
        name: Begins the names of the tasks.
        candidates: Has the column passage: what else can be found.

    Raises:
        UserError: If a file cannot be read, lacks a column or holds anything but texts.
    """
    path = Path(path)
    columns = read_texts(path, ["query", "passage"], _LANGUAGE)
    extra = [] if candidates is None else read_texts(Path(candidates), ["passage"])["passage"]
    ids = {text: f"d{number}" for number, text in enumerate(dict.fromkeys([*extra, *columns["passage"]]))}
    corpus = Dataset.from_dict({"id": list(ids.values()), "text": list(ids)})
    rows, codes = _subsets(columns)
    retrieval = {subset: {SPLIT: _retrieval_split(columns, of, ids, corpus)} for subset, of in rows.items()}
    bitext = {}
    for subset, of in rows.items():
        # Of several texts with one translation the first is kept: gold pairs are one to one.
        first = {columns["passage"][row]: columns["query"][row] for row in reversed(of)}
        pairs = Dataset.from_dict({"sentence1": list(first.values()), "sentence2": list(first)})
        bitext[subset] = DatasetDict({SPLIT: pairs})
    languages = codes["default"] if list(codes) == ["default"] else codes
    return [
        _task(LocalRetrieval, f"{name}Retrieval", "Retrieval", "ndcg_at_10", path, languages, retrieval),
        _task(LocalBitextMining, f"{name}BitextMining", "BitextMining", "f1", path, languages, bitext),
    ]


def labelled_tasks(path: Path | str, name: str, label: str) -> list[AbsTask]:
    """Classification and clustering of the queries of a parquet file by one of its columns.

    Every second row trains the classifier; the others are scored.

    Raises:
        UserError: If the file cannot be read, lacks a column or has fewer than two labels.
    """
    path = Path(path)
    columns = read_texts(path, ["query", label], _LANGUAGE)
    texts = dict(zip(columns["query"], columns[label], strict=True))
    if len(set(texts.values())) < 2:
        raise UserError(f"{path}: column {label!r} holds a single label; two are needed to classify")
    numbers = {value: number for number, value in enumerate(sorted(set(texts.values())))}
    data = Dataset.from_dict({"text": list(texts), "label": [numbers[value] for value in texts.values()]})
    halves = {"train": data.select(range(0, len(data), 2)), SPLIT: data.select(range(1, len(data), 2))}
    whole = data.rename_columns({"text": "sentences", "label": "labels"})
    word, languages = label.capitalize(), sorted({code for codes in _subsets(columns)[1].values() for code in codes})
    return [
        _task(
            LocalClassification,
            f"{name}{word}Classification",
            "Classification",
            "accuracy",
            path,
            languages,
            DatasetDict(halves),
        ),
        _task(
            LocalClustering,
            f"{name}{word}Clustering",
            "Clustering",
            "v_measure",
            path,
            languages,
            DatasetDict({SPLIT: whole}),
        ),
    ]


def cldr_tasks(folder: Path | str) -> list[AbsTask]:
    """All tasks of a CLDR build: retrieval, bitext mining, classification and clustering by script and kind."""
    folder = Path(folder)
    held_out = folder / "held_out.parquet"
    tasks = pair_tasks(held_out, "Cldr", folder / "candidates.parquet")
    return [*tasks, *(task for label in ("script", "kind") for task in labelled_tasks(held_out, "Cldr", label))]
