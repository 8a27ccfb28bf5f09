"""mteb tasks over data in memory, which mteb runs without a network: retrieval, bitext mining, labelled texts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata

from training.common.errors import UserError
from training.common.keyed import text_key
from training.data.cleaning.normalise import normalise

SPLIT = "test"

# Codes such as ``deu-Latn`` of a task without subsets, or by subset; empty if they are not known.
Languages = Sequence[str] | Mapping[str, Sequence[str]]

# A text and the query of the same text share an id: no query finds itself.
_FINDS_OTHERS = {"ignore_identical_ids": True}
# By mteb's type of task: base class, category, main score and attributes.
_KINDS: dict[str, tuple[type[AbsTask], str, str, dict[str, Any]]] = {
    # mteb's ranks up to a thousand take longer than all else where texts are short and subsets many.
    "Retrieval": (AbsTaskRetrieval, "t2t", "ndcg_at_10", {**_FINDS_OTHERS, "k_values": (1, 5, 10, 100)}),
    "Reranking": (AbsTaskRetrieval, "t2t", "map_at_1000", _FINDS_OTHERS),
    "BitextMining": (AbsTaskBitextMining, "t2t", "f1", {}),
    "Classification": (AbsTaskClassification, "t2c", "accuracy", {}),
    "Clustering": (AbsTaskClustering, "t2c", "v_measure", {"max_fraction_of_documents_to_embed": None}),
}


class TooFewError(UserError):
    """Good data that are too few for a task; tasks over other data can run."""


def make_task(task_type: str, name: str, path: Path, languages: Languages, data: Mapping[str, Any]) -> AbsTask:
    """Make a task that mteb can run, with data in the form of mteb's class: by subset and split, or by split."""
    kind, category, metric, attributes = _KINDS[task_type]
    metadata = TaskMetadata(
        name=name,
        description=f"Local data: {path.name}",
        # Results on other data of the same name are other results.
        dataset={"path": str(path), "revision": _hash(data, cache(lambda part: _hash(part.to_dict())))[:16]},
        type=task_type,
        category=category,
        eval_splits=[SPLIT],
        eval_langs=languages,
        main_score=metric,
    )
    task = type(name, (kind,), {"metadata": metadata, "load_data": lambda self, **_: None, **attributes})()
    task.dataset, task.data_loaded = data, True
    return task


def camel_case(name: str) -> str:
    """Return ``held_out`` as ``HeldOut``, as mteb names tasks."""
    return "".join(part.capitalize() for part in name.replace("-", "_").split("_"))


def _hash(value: Any, default: Any = None) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


class Corpus:
    """Distinct texts in which passages are searched."""

    def __init__(self, texts: Iterable[str]) -> None:
        # Ids by text, not by position: the order of rows must not decide between equal scores.
        self._ids = {text: f"{text_key(text):016x}" for text in dict.fromkeys(texts)}
        self._spellings: dict[str, list[str]] = defaultdict(list)
        for text, own in self._ids.items():
            self._spellings[normalise(text)].append(own)
        self.dataset = Dataset.from_dict({"id": list(self._ids.values()), "text": list(self._ids)})

    def split(
        self, queries: Sequence[str], passages: Sequence[str], negatives: Sequence[Sequence[str]] | None = None
    ) -> dict[str, Any]:
        """Return one split of a retrieval task, or (with negatives, the only other candidates) of a reranking task.

        All passages of rows with the same query are right, and so are texts of the corpus with the same normal form. A
        query does not find itself, unless it is its passage.
        """
        relevant: dict[str, dict[str, int]] = defaultdict(dict)
        candidates: dict[str, dict[str, None]] = defaultdict(dict)
        for query, passage, others in zip(queries, passages, negatives or repeat(()), strict=False):
            relevant[query].update(dict.fromkeys(self._spellings[normalise(passage)], 1))
            candidates[query].update(dict.fromkeys(self._ids[text] for text in (passage, *others)))
        if negatives is not None:
            relevant = {
                query: {each: 1 for each in own if each in candidates[query]} for query, own in relevant.items()
            }
        ids = {}
        for query, found in relevant.items():
            own_id = f"{text_key(query):016x}"
            ids[query] = f"q{own_id}" if own_id in found else own_id
        return {
            "corpus": self.dataset,
            "queries": Dataset.from_dict({"id": list(ids.values()), "text": list(ids)}),
            "relevant_docs": {ids[query]: found for query, found in relevant.items()},
            "top_ranked": negatives and {ids[query]: list(own) for query, own in candidates.items()},
        }


def labels_of(where: object, texts: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Return the label of each distinct text in a pseudo-random order; texts with several labels are left out.

    Order and repetition of the rows have no influence. ``where`` is for the message.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for text, label in zip(texts, labels, strict=True):
        found[text].add(label)
    clear = {text: own.pop() for text, own in found.items() if len(own) == 1}
    if sum(count >= 2 for count in Counter(clear.values()).values()) < 2:
        raise TooFewError(
            f"{where}: fewer than two labels have two texts, of {len(set(labels))} labels and {len(found)} texts; two "
            "are needed to classify"
        )
    return {text: clear[text] for text in sorted(clear, key=lambda text: text_key(f"order of labelled texts {text}"))}


def classification(name: str, path: Path, languages: Sequence[str], labels: Mapping[str, str]) -> AbsTask:
    """Make a classification task of :func:`labels_of`; half of each label's texts (rounded up) are for training."""
    halves: dict[str, dict[str, str]] = {"train": {}, SPLIT: {}}
    seen: Counter[str] = Counter()
    for text, label in labels.items():
        # The texts are in pseudo-random order, so every second one is a random half.
        halves["train" if seen[label] % 2 == 0 else SPLIT][text] = label
        seen[label] += 1
    data = {split: _dataset(labels, half, "text", "label") for split, half in halves.items()}
    return make_task("Classification", name, path, languages, DatasetDict(data))


def clustering(name: str, path: Path, languages: Sequence[str], labels: Mapping[str, str]) -> AbsTask:
    """Make a clustering task of :func:`labels_of`."""
    data = {SPLIT: _dataset(labels, labels, "sentences", "labels")}
    return make_task("Clustering", name, path, languages, DatasetDict(data))


def _dataset(labels: Mapping[str, str], part: Mapping[str, str], text_column: str, label_column: str) -> Dataset:
    numbers = {label: number for number, label in enumerate(sorted(set(labels.values())))}
    return Dataset.from_dict({text_column: list(part), label_column: [numbers[label] for label in part.values()]})
