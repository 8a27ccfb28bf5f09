"""Scores of a model on mteb tasks: all views of one encoding, with the scores of examples; resumed task by task."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytrec_eval
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.multilabel_classification import AbsTaskMultilabelClassification
from tqdm import tqdm
from transformers import set_seed

from training.common.errors import StoppedError, in_one_line
from training.evaluation.encoding import Floats
from training.evaluation.models import EvaluatedModel
from training.evaluation.records import Evaluation, Score
from training.evaluation.views import EncoderView

logger = logging.getLogger("training")

# Embeddings kept for the next task: local tasks share texts.
_HELD_BYTES = 4 << 30
# trec_eval's names of mteb's metrics; all but the reciprocal rank are followed by the number of ranks.
_TREC = {
    **{"ndcg_at": "ndcg_cut", "map_at": "map_cut", "mrr_at": "recip_rank"},
    **{"recall_at": "recall", "precision_at": "P", "hit_rate_at": "success"},
}
# If the mean of the examples is further from the score, the task computes its metric in another way.
_TOLERANCE = 1e-4

# By split and subset, the ``(n,)`` scores of the examples.
Found = dict[tuple[str, str], Floats]


def evaluate_model(
    model: EvaluatedModel,
    tasks: Sequence[AbsTask],
    evaluation: Evaluation,
    output: Path,
    *,
    dims: Sequence[int] = (),
    precisions: Sequence[str] = ("float32",),
) -> None:
    """Add the scores of a model to an evaluation, and save it after each task.

    Scores that the evaluation has are not computed again; a task that fails is recorded in its ``failures``. Results
    in mteb's format go to ``output/mteb``.
    """
    store, label = model.store, model.record.label
    views = [
        EncoderView(store, model.meta, dim, precision, model.prompts)
        for precision in precisions
        for dim in (dims or [store.width])
    ]
    evaluation.add_model(model.record)
    cache = mteb.ResultCache(output / "mteb")
    for task in (bar := tqdm(tasks, desc=label, unit="task")):
        bar.set_postfix_str(task.metadata.name)
        prefix = f"{label}: {task.metadata.name}"
        evaluation.failures = {
            key: why for key, why in evaluation.failures.items() if key != prefix and not key.startswith(f"{prefix}, ")
        }
        loaded_before = task.data_loaded
        with _quietly():
            _evaluate_task(model, task, views, evaluation, cache)
        if task.data_loaded and not loaded_before:
            task.unload_data()
        store.forget(_HELD_BYTES)
        if store.encoded:
            evaluation.add_model(replace(model.record, texts_per_second=store.texts_per_second))
        evaluation.save(output)
    logger.info("%s: %d texts encoded in %.0f s", label, store.encoded, store.seconds)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the progress bars and the warning that datasets and mteb show for each subset and view."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    # Warnings go to the log, which stays on the terminal.
    logging.captureWarnings(True)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning)
            yield
    finally:
        logging.captureWarnings(False)
        if shown:
            enable_progress_bars()


def _evaluate_task(
    model: EvaluatedModel, task: AbsTask, views: Sequence[EncoderView], evaluation: Evaluation, cache: mteb.ResultCache
) -> None:
    """Evaluate the views that have no scores on these data, which are loaded once."""
    prefix = f"{model.record.label}: {task.metadata.name}"
    for view in views:
        if _is_known(model, view, task, evaluation):
            continue
        key = prefix
        try:
            # An aggregate's data are those of its tasks.
            if not task.data_loaded and not isinstance(task, AbsTaskAggregate):
                task.load_data()
            key = f"{prefix}, {view.dimension} dimensions, {view.precision}"
            _run(model, view, task, evaluation, cache)
        # Data and code of a task can raise any exception; the other results must stay.
        except Exception as error:
            evaluation.failures[key] = f"{type(error).__name__}: {in_one_line(error)}"
            logger.error("%s: %s", key, evaluation.failures[key])
            if key == prefix:
                return


def _is_known(model: EvaluatedModel, view: EncoderView, task: AbsTask, evaluation: Evaluation) -> bool:
    """Return whether the evaluation has all scores of a view on these data, with their examples."""
    fields = {"model": model.record.label, "task": task.metadata.name, "data": task.metadata.revision}
    scores = evaluation.select(dimension=view.dimension, precision=view.precision, **fields)
    asked = {(split, subset) for split in task.eval_splits for subset in task.hf_subsets}
    if not asked <= {(score.split, score.subset) for score in scores}:
        return False
    return not has_examples(task) or all(score.key in evaluation.examples for score in scores)


def _run(
    model: EvaluatedModel, view: EncoderView, task: AbsTask, evaluation: Evaluation, cache: mteb.ResultCache
) -> None:
    # Otherwise the samples that clustering draws would depend on earlier views and models.
    for each in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
        set_seed(each.seed)
        each.rng_state, each.np_rng = random.Random(each.seed), np.random.default_rng(each.seed)
    with recorded(task) as found:
        # With its cache, mteb would write the results of all subsets again after each of them.
        results = mteb.evaluate(
            view, task, cache=None, co2_tracker=False, show_progress_bar=False, prediction_folder=cache.cache_path
        )
    if results.exceptions:
        raise StoppedError(results.exceptions[0].exception)
    for result in results.task_results:
        cache.save_to_cache(result, view.mteb_model_meta)
        _add(model, view, task, result, found, evaluation)


def _add(
    model: EvaluatedModel, view: EncoderView, task: AbsTask, result: Any, found: Found, evaluation: Evaluation
) -> None:
    """Add a result's scores and examples."""
    scores, examples = [], {}
    for split, subsets in result.scores.items():
        for subset in subsets:
            name = subset["hf_subset"]
            values, data = found.get((split, name)), _data_of(task, split, name)
            score = Score(
                model=model.record.label,
                task=task.metadata.name,
                task_type=task.metadata.type,
                subset=name,
                languages=tuple(subset["languages"]),
                dimension=view.dimension,
                precision=view.precision,
                metric=task.metadata.main_score,
                # As mteb's results are rounded.
                value=round(float(subset["main_score"]), 6),
                examples=0 if data is None else len(data["queries"] if isinstance(data, dict) else data),
                split=split,
                data=task.metadata.revision,
            )
            if values is not None:
                # An empty array says that the task computes its score in another way.
                examples[score.key] = values if agree(values, score.value) else values[:0]
                score = replace(score, examples=len(examples[score.key]) or score.examples)
            scores.append(score)
    evaluation.put(scores, examples)


def _data_of(task: AbsTask, split: str, subset: str) -> Any:
    """Return the data of a split and subset; None for data in another form, and for aggregates, which have none."""
    try:
        return task.dataset.get(subset, task.dataset)[split]
    except (AttributeError, KeyError, TypeError):
        return None


def has_examples(task: AbsTask) -> bool:
    """Whether the task's score is the mean of scores of its examples."""
    metric = task.metadata.main_score
    if isinstance(task, AbsTaskRetrieval):
        return metric.rpartition("_")[0] in _TREC
    if isinstance(task, AbsTaskMultilabelClassification):
        return False
    if isinstance(task, AbsTaskClassification):
        return metric == "accuracy" and not task.is_cross_validation
    return isinstance(task, AbsTaskBitextMining) and metric in ("f1", "accuracy")


def agree(examples: Floats, score: float) -> bool:
    """Whether the mean of the examples is the score."""
    return len(examples) > 0 and abs(float(examples.mean(dtype=np.float64)) - score) < _TOLERANCE


@contextmanager
def recorded(task: AbsTask) -> Iterator[Found]:
    """Collect the scores of examples, queries by id, while mteb evaluates the task with a ``prediction_folder``.

    mteb would write all predictions (a thousand documents per query) to files there; here, nothing is written.
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
                found[hf_split, hf_subset] = _scores(task, predictions, _data_of(task, hf_split, hf_subset))
        # The task's score is worth more than those of its examples.
        except (ValueError, KeyError, TypeError, IndexError) as error:
            logger.warning("%s, %s: no scores of examples (%s)", task.metadata.name, hf_subset, in_one_line(error))
            found[hf_split, hf_subset] = np.empty(0, np.float32)

    task._save_task_predictions = record
    try:
        yield found
    finally:
        del task._save_task_predictions


def _scores(task: AbsTask, predictions: Any, data: Any) -> Floats:
    if isinstance(task, AbsTaskRetrieval):
        return _retrieval(task, predictions, data["relevant_docs"])
    if isinstance(task, AbsTaskBitextMining):
        gold = [pair[1] for pair in data["gold"]] if "gold" in data else range(len(data))
        return _bitext(task, predictions["sentence1-sentence2"], gold)
    # Classification: the share of mteb's experiments in which each text got its label.
    labels = np.asarray(list(data[task.label_column_name]))
    return np.mean(np.asarray(predictions) == labels[None], axis=0).astype(np.float32)


def _retrieval(task: AbsTaskRetrieval, results: Mapping[str, Mapping[str, float]], relevant: Any) -> Floats:
    """Return the main metric of each query."""
    name, _, ranks = task.metadata.main_score.rpartition("_")
    measure = "recip_rank" if name == "mrr_at" else f"{_TREC[name]}.{ranks}"
    queries = sorted(set(results) & set(relevant))
    ranked: dict[str, dict[str, float]] = {}
    for query in queries:
        found = sorted(results[query].items(), key=lambda item: item[1], reverse=True)
        found = [(doc, value) for doc, value in found if doc != query or not task.ignore_identical_ids]
        found = found[1:] if task.skip_first_result else found
        ranked[query] = dict(found[: int(ranks)] if name == "mrr_at" else found)
    evaluator = pytrec_eval.RelevanceEvaluator({query: dict(relevant[query]) for query in queries}, {measure})
    scored = evaluator.evaluate(ranked)
    return np.array([scored[query][measure.replace(".", "_")] for query in queries], np.float32)


def _bitext(task: AbsTask, neighbours: Sequence[Mapping[str, float]], gold: Sequence[int]) -> Floats:
    """Return the main metric of each pair; F1 weighted by labels is their mean, as each label has one pair."""
    found = np.array([each["corpus_id"] for each in neighbours], np.int64)
    expected = np.asarray(gold, np.int64)
    hits = (found == expected).astype(np.float32)
    if task.metadata.main_score == "accuracy":
        return hits
    # A label found n times has precision 1/n and recall 1, so F1 is 2 / (1 + n).
    times = np.bincount(found, minlength=int(max(found.max(), expected.max())) + 1)
    return (2 * hits / (1 + times[expected])).astype(np.float32)
