"""Tasks of mteb's own classes over data in memory."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskMultilabelClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

TEXTS = [f"{word} {number} {other}" for number in range(5) for word in "ab" for other in ("rain", "sun", "wind")]
HALF = len(TEXTS) // 2
SIDES = {"sentence1": TEXTS[:HALF], "sentence2": TEXTS[HALF:]}


def make(kind, metric, data, languages=("eng-Latn",)):
    """A task of one of mteb's classes over data in memory: by split, or by subset and split."""
    task_type = kind.__name__.removeprefix("AbsTask")
    names = {"name": f"Memory{task_type}", "type": task_type, "main_score": metric, "category": "t2t"}
    data_of = {"description": "In memory.", "dataset": {"path": "memory", "revision": "1"}}
    metadata = TaskMetadata(**names, **data_of, eval_splits=["test"], eval_langs=languages)
    task = type(metadata.name, (kind,), {"metadata": metadata, "load_data": lambda self, **_: None})()
    task.dataset, task.data_loaded = data, True
    return task


def splits(*names, **columns):
    return DatasetDict({name: Dataset.from_dict(columns) for name in names or ["test"]})


def sts():
    return make(AbsTaskSTS, "cosine_spearman", splits(**SIDES, score=np.linspace(0, 5, HALF).tolist()))


def clustering():
    data = splits(sentences=TEXTS, labels=[n % 3 for n in range(len(TEXTS))])
    task = make(AbsTaskClustering, "v_measure", data)
    task.max_fraction_of_documents_to_embed, task.max_documents_to_embed, task.max_documents_per_cluster = None, 20, 10
    return task


def multilabel():
    data = splits("train", "test", text=TEXTS, label=[[n % 2, 2 + n % 3] for n in range(len(TEXTS))])
    return make(AbsTaskMultilabelClassification, "accuracy", data)


def classification():
    halves = splits("train", "test", text=TEXTS, label=[n // 3 % 2 for n in range(len(TEXTS))])
    languages = {"en": ["eng-Latn"], "de": ["deu-Latn"]}
    return make(AbsTaskClassification, "accuracy", dict.fromkeys(languages, halves), languages)


def parallel_bitext():
    data = splits(eng=TEXTS[:HALF], deu=TEXTS[HALF:], fra=TEXTS[:HALF][::-1])
    languages = {"eng-deu": ["eng-Latn", "deu-Latn"], "eng-fra": ["eng-Latn", "fra-Latn"]}
    task = make(AbsTaskBitextMining, "f1", data, languages)
    task.parallel_subsets = True
    return task


def retrieval():
    corpus = [{"id": f"d{n}", "title": text[:1], "text": text} for n, text in enumerate(TEXTS)]
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(TEXTS[::4])]
    relevant = {f"q{n}": {f"d{(5 * n) % len(TEXTS)}": 2, f"d{n}": 1} for n in range(len(queries))}
    data = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries), "relevant_docs": relevant}
    return make(AbsTaskRetrieval, "ndcg_at_10", {"default": {"test": {**data, "top_ranked": None}}})


KINDS = [sts, clustering, multilabel, classification, parallel_bitext, retrieval]
