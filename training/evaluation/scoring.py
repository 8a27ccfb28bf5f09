"""Scores a model on mteb tasks: every view of one encoding, with what each example scored; resumed task by task."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mteb
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb._evaluators.text import bitext_mining_evaluator
from mteb._set_seed import _set_seed
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from tqdm import tqdm

from training.common.errors import StoppedError, in_one_line
from training.evaluation.examples import Found, agree, data_of, has_examples, recorded
from training.evaluation.models import EvaluatedModel
from training.evaluation.records import Evaluation, Score
from training.evaluation.search import SearchView

logger = logging.getLogger("training")

# Embeddings that are held for the next task: local tasks ask for the same texts again.
_HELD_BYTES = 4 << 30


def evaluate_model(
    model: EvaluatedModel,
    tasks: Sequence[AbsTask],
    evaluation: Evaluation,
    output: Path,
    *,
    dims: Sequence[int] = (),
    precisions: Sequence[str] = ("float32",),
) -> None:
    """Adds the scores of a model to an evaluation, and saves it after each task.

    What mteb's cache in ``output`` holds is not run again. A task that fails is noted in ``failures``.

    Raises:
        UserError: If a dimension is not one of the model's.
    """
    store, label = model.store, model.record.label
    views = [
        SearchView(store, model.meta, dim, precision, model.prompts)
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
        with _quietly():
            evaluation.failures |= _evaluate_task(model, task, views, evaluation, cache)
        store.forget(_HELD_BYTES)
        if store.encoded:
            evaluation.add_model(replace(model.record, texts_per_second=store.texts_per_second))
        evaluation.save(output)
    logger.info("%s: %d texts encoded in %.0f s", label, store.encoded, store.seconds)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hides the bars and the warning that datasets and mteb's bitext mining show for each subset and view."""
    shown, original = are_progress_bars_disabled() is False, bitext_mining_evaluator.tqdm
    disable_progress_bars()
    bitext_mining_evaluator.tqdm = partial(original, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="To copy construct from a tensor", category=UserWarning)
            yield
    finally:
        bitext_mining_evaluator.tqdm = original
        if shown:
            enable_progress_bars()


def _evaluate_task(
    model: EvaluatedModel,
    task: AbsTask,
    views: Sequence[SearchView],
    evaluation: Evaluation,
    cache: mteb.ResultCache,
) -> dict[str, str]:
    """All views; the data are loaded once, and only if a view is not known already.

    Returns:
        What failed and why; whatever a task's data or code raises, other results must stay.
    """
    prefix, failures = f"{model.record.label}: {task.metadata.name}", {}
    loaded_before = task.data_loaded
    for view in views:
        try:
            done = _cached(task, view, cache)
            if done is not None and _take(model, view, task, done, {}, evaluation):
                continue
            # An aggregate's data are those of its tasks.
            if not task.data_loaded and not isinstance(task, AbsTaskAggregate):
                task.load_data()
        except Exception as error:
            failures[prefix] = _reason(prefix, error)
            break
        try:
            _run(model, view, task, evaluation, cache)
        except Exception as error:
            key = f"{prefix}, {view.dimension} dimensions, {view.precision}"
            failures[key] = _reason(key, error)
    if task.data_loaded and not loaded_before:
        task.unload_data()
    return failures


def _reason(what: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {in_one_line(error)}"
    logger.error("%s: %s", what, reason)
    return reason


def _run(
    model: EvaluatedModel, view: SearchView, task: AbsTask, evaluation: Evaluation, cache: mteb.ResultCache
) -> None:
    """Lets mteb evaluate a view of a task as a whole, as if nothing had been evaluated before."""
    # The samples that clustering draws would depend on the views and models before.
    for each in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
        each.rng_state, each.np_rng = _set_seed(each.seed)
    with recorded(task) as found:
        # With its cache, mteb would write the results of all subsets anew after each of them.
        results = mteb.evaluate(
            view,
            task,
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
            prediction_folder=cache.cache_path,
        )
    if results.exceptions:
        raise StoppedError(results.exceptions[0].exception)
    for result in results.task_results:
        cache.save_to_cache(result, view.mteb_model_meta)
        _take(model, view, task, result, found, evaluation)


def _cached(task: AbsTask, view: SearchView, cache: mteb.ResultCache) -> Any:
    """The whole result that mteb's cache holds, or None."""
    try:
        results = mteb.evaluate(
            view, task, cache=cache, co2_tracker=False, show_progress_bar=False, overwrite_strategy="only-cache"
        )
    except ValueError:
        return None
    return None if _is_of_other_data(task, view, cache) else results.task_results[0]


def _is_of_other_data(task: AbsTask, view: SearchView, cache: mteb.ResultCache) -> bool:
    """Whether mteb's cache holds a result on other data of the task's name.

    mteb compares revisions only where it adds subsets to a result, and would take a whole one as it is.
    """
    known = cache.load_task_result(task.metadata.name, view.mteb_model_meta)
    return known is not None and known.dataset_revision != task.metadata.revision


def _take(
    model: EvaluatedModel, view: SearchView, task: AbsTask, result: Any, found: Found, evaluation: Evaluation
) -> bool:
    """Adds a result's scores with their examples, found now or earlier; False if they lack some that can be found."""
    scores, examples, whole = [], {}, True
    for split, subsets in result.scores.items():
        for subset in subsets:
            score = _score(model, view, task, split, subset)
            values = found.get((split, score.subset), evaluation.examples.get(score.key))
            count = _count(task, split, score.subset, evaluation, score.key)
            if values is None:
                whole = whole and not has_examples(task)
            else:
                # None at all says that they were looked for, and that the task makes its score in another way.
                examples[score.key] = values if agree(values, score.value) else values[:0]
                count = len(examples[score.key]) or count
            score = replace(score, examples=count)
            scores.append(score)
    if not whole and not found:
        return False
    evaluation.put(scores, examples)
    return True


def _score(model: EvaluatedModel, view: SearchView, task: AbsTask, split: str, found: dict[str, Any]) -> Score:
    return Score(
        model=model.record.label,
        task=task.metadata.name,
        task_type=task.metadata.type,
        subset=found["hf_subset"],
        languages=tuple(found["languages"]),
        dimension=view.dimension,
        precision=view.precision,
        metric=task.metadata.main_score,
        # As mteb's cache rounds, so that a resumed run gives the same.
        value=round(float(found["main_score"]), 6),
        examples=0,
        split=split,
        data=task.metadata.revision,
    )


def _count(task: AbsTask, split: str, subset: str, evaluation: Evaluation, key: str) -> int:
    """Queries, pairs or texts of a subset: from the data, or as noted before; 0 if neither is there."""
    if not task.data_loaded or not task.dataset:
        return next((score.examples for score in evaluation.scores if score.key == key), 0)
    try:
        data = data_of(task, split, subset)
    except (KeyError, TypeError):
        return 0
    return len(data["queries"]) if isinstance(data, dict) else len(data)
