"""What each example of a task scored, from the predictions that mteb makes one score of."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.multilabel_classification import AbsTaskMultilabelClassification
from numpy.typing import NDArray

from training.common.errors import in_one_line

logger = logging.getLogger("training")

# By mteb's name of a metric, that of trec_eval; both end in a number of ranks.
_TREC = {
    "ndcg_at": "ndcg_cut",
    "map_at": "map_cut",
    "recall_at": "recall",
    "precision_at": "P",
    "hit_rate_at": "success",
}
# A mean of the examples that is further from the score means that the task's metric is another.
_TOLERANCE = 1e-4

Found = dict[tuple[str, str], NDArray[np.float32]]


def has_examples(task: AbsTask) -> bool:
    """Whether the task's score can be taken apart into its examples': their mean is the score."""
    metric = task.metadata.main_score
    if isinstance(task, AbsTaskRetrieval):
        return metric.rpartition("_")[0] in (*_TREC, "mrr_at")
    if isinstance(task, AbsTaskMultilabelClassification):
        return False
    if isinstance(task, AbsTaskClassification):
        return metric == "accuracy" and not task.is_cross_validation
    return isinstance(task, AbsTaskBitextMining) and metric in ("f1", "accuracy")


@contextmanager
def recorded(task: AbsTask) -> Iterator[Found]:
    """Fills a dictionary with what each example scored while mteb evaluates the task with a ``prediction_folder``.

    mteb would write every prediction to a file there (a thousand documents a query); nothing is written.

    Yields:
        By split and subset, ``(n,)`` scores of the examples. Queries are in the order of their ids.
    """
    found: Found = {}

    def record(predictions: Any, model: Any, prediction_folder: Path, hf_split: str, hf_subset: str) -> None:
        if not has_examples(task):
            return
        try:
            if hf_subset == "parallel":
                for pair, of_pair in predictions.items():
                    found[hf_split, pair] = _bitext(task, of_pair, range(len(of_pair)))
            else:
                found[hf_split, hf_subset] = _scores(task, predictions, data_of(task, hf_split, hf_subset))
        # Examples are worth less than the task's score, which such an error would cost.
        except (ValueError, KeyError, TypeError, IndexError) as error:
            logger.warning("%s, %s: no scores of examples (%s)", task.metadata.name, hf_subset, in_one_line(error))
            found[hf_split, hf_subset] = np.empty(0, np.float32)

    task._save_task_predictions = record
    try:
        yield found
    finally:
        del task._save_task_predictions


def data_of(task: AbsTask, split: str, subset: str) -> Any:
    """The data of a subset, as mteb finds them."""
    of_subset = task.dataset[subset] if subset in task.dataset else task.dataset
    return of_subset[split]


def agree(examples: NDArray[np.float32], score: float) -> bool:
    """Whether the examples' mean is the score."""
    return len(examples) > 0 and abs(float(examples.mean(dtype=np.float64)) - score) < _TOLERANCE


def _scores(task: AbsTask, predictions: Any, data: Any) -> NDArray[np.float32]:
    if isinstance(task, AbsTaskRetrieval):
        return _retrieval(task, predictions, data["relevant_docs"])
    if isinstance(task, AbsTaskBitextMining):
        gold = [pair[1] for pair in data["gold"]] if "gold" in data else range(len(data))
        return _bitext(task, predictions["sentence1-sentence2"], gold)
    return _classification(predictions, list(data[task.label_column_name]))


def _retrieval(
    task: AbsTaskRetrieval, results: Mapping[str, Mapping[str, float]], relevant: Mapping[str, Mapping[str, int]]
) -> NDArray[np.float32]:
    """The main metric of each query."""
    if task.ignore_identical_ids:
        results = {query: {doc: s for doc, s in docs.items() if doc != query} for query, docs in results.items()}
    if task.skip_first_result:
        results = {
            query: dict(sorted(docs.items(), key=lambda item: item[1], reverse=True)[1:])
            for query, docs in results.items()
        }
    name, _, ranks = task.metadata.main_score.rpartition("_")
    queries = sorted(set(results) & set(relevant))
    if name == "mrr_at":
        return np.array([_reciprocal_rank(results[q], relevant[q], int(ranks)) for q in queries], np.float32)
    measure = f"{_TREC[name]}.{ranks}"
    scored = pytrec_eval.RelevanceEvaluator({q: dict(relevant[q]) for q in queries}, {measure}).evaluate(
        {q: dict(results[q]) for q in queries}
    )
    return np.array([scored[q][measure.replace(".", "_")] for q in queries], np.float32)


def _reciprocal_rank(docs: Mapping[str, float], relevant: Mapping[str, int], ranks: int) -> float:
    ordered = sorted(docs, key=lambda doc: docs[doc], reverse=True)[:ranks]
    return next((1 / rank for rank, doc in enumerate(ordered, 1) if relevant.get(doc, 0) > 0), 0.0)


def _bitext(task: AbsTask, neighbours: Sequence[Mapping[str, float]], gold: Sequence[int]) -> NDArray[np.float32]:
    """The main metric of each pair; F1 weighted by labels is their mean, as each label has one pair."""
    found = np.array([each["corpus_id"] for each in neighbours], np.int64)
    expected = np.asarray(gold, np.int64)
    hits = (found == expected).astype(np.float32)
    if task.metadata.main_score == "accuracy":
        return hits
    # Of a label found n times: precision 1/n and recall 1, so 2 / (1 + n).
    times = np.bincount(found, minlength=int(max(found.max(), expected.max())) + 1)
    return (2 * hits / (1 + times[expected])).astype(np.float32)


def _classification(predictions: Sequence[Sequence[Any]], labels: Sequence[Any]) -> NDArray[np.float32]:
    """The share of experiments that told each text's label."""
    return np.mean(np.asarray(predictions) == np.asarray(labels)[None], axis=0).astype(np.float32)
