"""Scores of one model on one task, by mteb, and those of the task's examples."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from filelock import FileLock
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.multilabel_classification import AbsTaskMultilabelClassification
from mteb.results import TaskResult
from transformers import set_seed

from training.common.errors import StoppedError, UserError, in_one_line
from training.evaluation.encoding import Floats
from training.evaluation.local_tasks import local_tasks
from training.evaluation.models import EncoderView
from training.evaluation.records import Evaluation, Score, check_known

logger = logging.getLogger("training")


# trec_eval's names of mteb's metrics, without the number of ranks.
_TREC = {
    **{"ndcg_at": "ndcg_cut", "map_at": "map_cut", "recall_at": "recall"},
    **{"precision_at": "P", "hit_rate_at": "success"},
}
# If the mean of the examples is further from the score, the task computes its metric in another way.
_TOLERANCE = 1e-4

# By split and subset, the ``(n,)`` scores of the examples.
Found = dict[tuple[str, str], Floats]


def find_tasks(names: Sequence[str] = (), benchmark: str | None = None, local: Sequence[str] = ()) -> list[AbsTask]:
    """Return the tasks of mteb by name, those of a benchmark, and those of local files and folders."""
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)} if names else ()
    for name in names:
        check_known("task", name, known)
    tasks = [mteb.get_task(name) for name in names]
    if benchmark is not None:
        check_known("benchmark", benchmark, (each.name for each in mteb.get_benchmarks()))
        tasks += list(mteb.get_benchmark(benchmark).tasks)
    tasks += [task for path in local for task in local_tasks(Path(path))]
    if not tasks:
        raise UserError("nothing to evaluate on; give --tasks, --benchmark or --local")
    [(name, count)] = Counter(task.metadata.name for task in tasks).most_common(1)
    if count > 1:
        raise UserError(f"two tasks are called {name}; name them once, or rename a local file")
    return tasks


@contextmanager
def quietly() -> Iterator[None]:
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


def evaluate_task(
    label: str, task: AbsTask, views: Sequence[EncoderView], evaluation: Evaluation, cache: mteb.ResultCache
) -> None:
    """Evaluate the views that have no scores on these data, which are loaded once."""
    whole_task = f"{label}: {task.metadata.name}"
    evaluation.failures.pop(whole_task, None)
    evaluation.forget_failures(f"{whole_task}, ")
    for view in views:
        if is_known(view, task, evaluation):
            continue
        key = whole_task
        try:
            load_data(task)
            of_exit = view.label.removeprefix(label)
            key = f"{whole_task}, {view.dimension} dimensions, {view.precision}{of_exit}"
            _add_scores(view, task, evaluation, cache)
        # Data and code of a task can raise any exception; the other results must stay.
        except Exception as error:
            evaluation.failures[key] = f"{type(error).__name__}: {in_one_line(error)}"
            logger.error("%s: %s", key, evaluation.failures[key])
            if key == whole_task:
                return


def load_data(task: AbsTask) -> None:
    """Load the data of a task; an aggregate's are those of its tasks."""
    if not task.data_loaded and not isinstance(task, AbsTaskAggregate):
        task.load_data()


def is_known(view: EncoderView, task: AbsTask, evaluation: Evaluation) -> bool:
    """Return whether the evaluation has all scores of a view on these data, with their examples."""
    fields = {"model": view.label, "task": task.metadata.name, "data": task.metadata.revision}
    scores = evaluation.select(dimension=view.dimension, precision=view.precision, **fields)
    asked = {(split, subset) for split in task.eval_splits for subset in task.hf_subsets}
    if not asked <= {(score.split, score.subset) for score in scores}:
        return False
    return not has_examples(task) or all(score.key in evaluation.examples for score in scores)


def run_task(view: EncoderView, task: AbsTask, folder: Path | None = None) -> tuple[TaskResult, Found]:
    """Let mteb evaluate a task; ``folder`` (nothing is written there) asks for the scores of its examples."""
    # Otherwise the samples that clustering draws would depend on earlier views and models.
    for each in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
        set_seed(each.seed)
        each.rng_state, each.np_rng = random.Random(each.seed), np.random.default_rng(each.seed)
    with recorded(task) as found:
        # With its cache, mteb would write the results of all subsets again after each of them.
        options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
        results = mteb.evaluate(view, task, prediction_folder=folder, **options)
    if results.exceptions:
        raise StoppedError(results.exceptions[0].exception)
    (result,) = results.task_results
    return result, found


def _add_scores(view: EncoderView, task: AbsTask, evaluation: Evaluation, cache: mteb.ResultCache) -> None:
    result, found = run_task(view, task, cache.cache_path if has_examples(task) else None)
    # mteb reads and writes again what other processes write, too.
    with FileLock(cache.cache_path.with_name(".mteb.lock")):
        cache.save_to_cache(result, view.mteb_model_meta)
    scores, examples = [], {}
    for split, subset in ((split, subset) for split, subsets in result.scores.items() for subset in subsets):
        name, data = subset["hf_subset"], _data_of(task, split, subset["hf_subset"])
        score = Score(
            model=view.label,
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
        if has_examples(task):
            values = found.get((split, name), np.empty(0, np.float32))
            # An empty array says that the task computes its score in another way.
            agree = len(values) > 0 and abs(float(values.mean(dtype=np.float64)) - score.value) < _TOLERANCE
            examples[score.key] = values if agree else values[:0]
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
    if isinstance(task, AbsTaskClassification) and not isinstance(task, AbsTaskMultilabelClassification):
        return metric == "accuracy" and not task.is_cross_validation
    return isinstance(task, AbsTaskBitextMining) and metric in ("f1", "accuracy")


@contextmanager
def recorded(task: AbsTask) -> Iterator[Found]:
    """Collect the scores of examples, queries by id, while mteb evaluates the task with a ``prediction_folder``.

    mteb would write all predictions (a thousand documents per query) to files there; here, nothing is written.
    """
    found: Found = {}

    # The task's score is worth more than those of its examples.
    @contextmanager
    def tolerant() -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, IndexError) as error:
            logger.warning("%s: its examples are not recorded (%s)", task.metadata.name, in_one_line(error))

    def of_predictions(predictions: Any, model: Any, prediction_folder: Path, hf_split: str, hf_subset: str) -> None:
        with tolerant():
            data = _data_of(task, hf_split, hf_subset)
            if isinstance(task, AbsTaskClassification):
                # The share of mteb's experiments in which each text got its label.
                right = np.asarray(predictions) == np.asarray(list(data[task.label_column_name]))
                found[hf_split, hf_subset] = right.mean(axis=0).astype(np.float32)
            for pair, nearest in predictions.items() if isinstance(task, AbsTaskBitextMining) else ():
                parallel = hf_subset == "parallel"
                gold = [right for _, right in data["gold"]] if not parallel and "gold" in data else range(len(nearest))
                positions, gold = np.array([each["corpus_id"] for each in nearest]), np.asarray(gold)
                hits = (positions == gold).astype(np.float32)
                if task.metadata.main_score == "f1":
                    # A label found n times has precision 1/n and recall 1; weighted by labels, each with one pair.
                    hits *= 2 / (1 + np.bincount(positions, minlength=int(gold.max()) + 1)[gold])
                found[hf_split, pair if parallel else hf_subset] = hits

    def of_queries(scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str) -> dict[str, float]:
        name, _, ranks = task.metadata.main_score.rpartition("_")
        with tolerant():
            values = [scores[query][f"{_TREC[name]}_{ranks}"] for query in sorted(scores)]
            found[hf_split, hf_subset] = np.array(values, np.float32)
        return type(task).task_specific_scores(task, scores, qrels, results, hf_split, hf_subset)

    task._save_task_predictions, task.task_specific_scores = of_predictions, of_queries
    try:
        yield found
    finally:
        del task._save_task_predictions, task.task_specific_scores
