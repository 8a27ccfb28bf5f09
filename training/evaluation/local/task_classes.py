"""mteb's task classes over data that are there already, so that mteb itself runs them without a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata

from training.common.errors import UserError

SPLIT = "test"

# Of a task without subsets, or by subset; empty where they are not known.
Languages = Sequence[str] | Mapping[str, Sequence[str]]


class UnfitError(UserError):
    """Good data that are too few for a task; the tasks of other data can be run without it."""


class LocalReranking(AbsTaskRetrieval):
    """Finding the passages of each query among candidates of its own."""

    # A text and the query of the same text share an id: no query has itself as a candidate.
    ignore_identical_ids = True

    def load_data(self, **_: Any) -> None:
        """Nothing to do: the data came with the task."""


class LocalRetrieval(LocalReranking):
    """Finding the passages of each query."""

    # mteb's own, up to a thousand, take it longer than all else where texts are short and subsets many.
    k_values = (1, 5, 10, 100)


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


# By mteb's type of task: class, category and main score.
_KINDS: dict[str, tuple[type[AbsTask], str, str]] = {
    "Retrieval": (LocalRetrieval, "t2t", "ndcg_at_10"),
    "Reranking": (LocalReranking, "t2t", "map_at_1000"),
    "BitextMining": (LocalBitextMining, "t2t", "f1"),
    "Classification": (LocalClassification, "t2c", "accuracy"),
    "Clustering": (LocalClustering, "t2c", "v_measure"),
}


def make_task(task_type: str, name: str, place: Path, languages: Languages, data: Mapping[str, Any]) -> AbsTask:
    """A task that mteb can run.

    Args:
        task_type: mteb's type: ``Retrieval``, ``Reranking``, ``BitextMining``, ``Classification`` or ``Clustering``.
        name: Its name; mteb keeps results by it.
        place: Where the data lie.
        languages: ISO 639-3 codes with scripts, ``deu-Latn``.
        data: The data in the form that mteb's class has, by subset and split, or by split.
    """
    kind, category, metric = _KINDS[task_type]
    metadata = TaskMetadata(
        name=name,
        description=f"Local data: {place.name}",
        # Results on other data of the same name are other results.
        dataset={"path": str(place), "revision": _revision(data)},
        type=task_type,
        category=category,
        eval_splits=[SPLIT],
        eval_langs=languages,
        main_score=metric,
    )
    task = type(name, (kind,), {"metadata": metadata})()
    task.dataset, task.data_loaded = data, True
    return task


def camel_case(name: str) -> str:
    """``held_out`` as ``HeldOut``, as mteb names tasks."""
    return "".join(part.capitalize() for part in name.replace("-", "_").split("_"))


def _revision(data: Mapping[str, Any]) -> str:
    """A hash of all that is scored; a corpus that subsets share is read once."""
    known: dict[int, str] = {}

    def described(dataset: Dataset) -> str:
        if id(dataset) not in known:
            known[id(dataset)] = _hash(dataset.to_dict())
        return known[id(dataset)]

    return _hash(data, described)[:16]


def _hash(value: Any, default: Any = None) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()
