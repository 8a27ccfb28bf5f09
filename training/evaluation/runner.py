"""Evaluation of models on mteb's tasks, its benchmarks or local data, from options to scores and report."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.multilabel_classification import AbsTaskMultilabelClassification
from tqdm import tqdm
from transformers import set_seed

from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import locked
from training.common.run_folder import manifest_of, run_of
from training.evaluation.encoding import Floats
from training.evaluation.figures import find_log
from training.evaluation.local_tasks import local_tasks
from training.evaluation.models import EncoderView, EvaluatedModel, load_model, revisions_of
from training.evaluation.records import Evaluation, Score, check_known, labels, load_evaluation
from training.evaluation.report import as_text, check_report_folder, view_table, write_report
from training.evaluation.summary import known_rows, training_rows
from training.models.devices import choose_devices
from training.models.model_ref import find_model

logger = logging.getLogger("training")

# Embeddings kept for the next task: local tasks share texts.
_HELD_BYTES = 4 << 30
# trec_eval's names of mteb's metrics, without the number of ranks.
_TREC = {
    **{"ndcg_at": "ndcg_cut", "map_at": "map_cut", "recall_at": "recall"},
    **{"precision_at": "P", "hit_rate_at": "success"},
}
# If the mean of the examples is further from the score, the task computes its metric in another way.
_TOLERANCE = 1e-4

# By split and subset, the ``(n,)`` scores of the examples.
Found = dict[tuple[str, str], Floats]


def evaluate(args: Namespace) -> None:
    """Evaluate models and write the report; see ``evaluate.py`` for the options."""
    if args.max_length < 1:
        raise UserError(f"--max-length must be at least 1, got {args.max_length}")
    args.devices = choose_devices(args.devices)
    args.output = args.output or Path("runs/evaluation")
    check_report_folder(args.output, [*map(Path, args.local), *([args.manifest] if args.manifest else [])])
    # Another command that evaluates into the folder would overwrite these scores with its own.
    with locked(args.output):
        _evaluate(args)


def _evaluate(args: Namespace) -> None:
    tasks = find_tasks(args.tasks, args.benchmark, args.local)
    evaluation = load_evaluation(args.output, missing_ok=True)
    revisions = [name for each in args.revision for name in (revisions_of(args.model) if each == "all" else [each])]
    models = [(args.model, revision) for revision in revisions or [None]] + [(name, None) for name in args.against]
    names = {model: "@".join(filter(None, model)) for model in models}
    check_report_folder(args.output, [Path(find_model(*model)[0]) for model in names])
    for label in args.compare or ():
        # Labels end in the options that differ from the defaults.
        known = [each.partition(" (")[0] for each in (*labels(evaluation), *names.values())]
        check_known("--compare", label.partition(" (")[0], known)
    run = run_of(args.model)
    rows = training_rows(args.manifest) if args.manifest else known_rows(manifest_of(run) if run else None)
    done = []
    # A fault of one model does not cost the others.
    for (name, revision), shown in names.items():
        evaluation.failures.pop(f"{shown}: all", None)
        try:
            for rank in args.ranks:
                options = (args.max_length, args.prompts, args.trust_remote_code, args.devices, args.layers, rank)
                model = load_model(name, revision, *options)
                with closing(model.store.encoder):
                    evaluate_model(model, tasks, evaluation, args.output, dims=args.dims, precisions=args.precisions)
                done += [model.record.label, *(record.label for record in model.exits.values())]
        except UserError as error:
            if len(names) == 1:
                raise
            logger.error("%s", error)
            evaluation.failures[f"{shown}: all"] = str(error)
            evaluation.save(args.output)
    if not done:
        raise UserError("none of the models could be evaluated; the reasons are above")
    sys.stdout.write(f"{as_text(view_table(score for score in evaluation.scores if score.model in done))}\n\n")
    options = {"rows": rows, "runs": [run] if run and find_log(run) else []}
    try:
        sys.stdout.write(write_report(evaluation, args.output, compare=args.compare, **options))
    except UserError:
        # If the models cannot be compared, there is a report all the same.
        write_report(evaluation, args.output, **options)
        raise
    of_these = tuple(f"{name}: " for name in (*done, *names.values()))
    if failed := [key for key in evaluation.failures if key.startswith(of_these)]:
        raise StoppedError(f"{len(failed)} of {len(tasks) * len(names)} tasks failed, see {args.output}")


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
    widths = dict.fromkeys(dims or [store.width])
    combined = product(model.exits or [None], dict.fromkeys(precisions), widths)
    views = [EncoderView(model, dim, precision, layers) for layers, precision, dim in combined]
    for record in (*model.exits.values(), model.record):
        evaluation.add_model(record)
    cache = mteb.ResultCache(output / "mteb")
    for task in (bar := tqdm(tasks, desc=label, unit="task")):
        bar.set_postfix_str(task.metadata.name)
        loaded_before = task.data_loaded
        with _quietly():
            _evaluate_task(label, task, views, evaluation, cache)
        if task.data_loaded and not loaded_before:
            task.unload_data()
        store.forget(_HELD_BYTES)
        if store.encoded:
            evaluation.add_model(replace(model.record, texts_per_second=store.encoded / store.seconds))
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
    label: str, task: AbsTask, views: Sequence[EncoderView], evaluation: Evaluation, cache: mteb.ResultCache
) -> None:
    """Evaluate the views that have no scores on these data, which are loaded once."""
    whole_task = f"{label}: {task.metadata.name}"
    evaluation.failures.pop(whole_task, None)
    evaluation.forget_failures(f"{whole_task}, ")
    for view in views:
        if _is_known(view, task, evaluation):
            continue
        key = whole_task
        try:
            # An aggregate's data are those of its tasks.
            if not task.data_loaded and not isinstance(task, AbsTaskAggregate):
                task.load_data()
            of_exit = view.label.removeprefix(label)
            key = f"{whole_task}, {view.dimension} dimensions, {view.precision}{of_exit}"
            _add_scores(view, task, evaluation, cache)
        # Data and code of a task can raise any exception; the other results must stay.
        except Exception as error:
            evaluation.failures[key] = f"{type(error).__name__}: {in_one_line(error)}"
            logger.error("%s: %s", key, evaluation.failures[key])
            if key == whole_task:
                return


def _is_known(view: EncoderView, task: AbsTask, evaluation: Evaluation) -> bool:
    """Return whether the evaluation has all scores of a view on these data, with their examples."""
    fields = {"model": view.label, "task": task.metadata.name, "data": task.metadata.revision}
    scores = evaluation.select(dimension=view.dimension, precision=view.precision, **fields)
    asked = {(split, subset) for split in task.eval_splits for subset in task.hf_subsets}
    if not asked <= {(score.split, score.subset) for score in scores}:
        return False
    return not has_examples(task) or all(score.key in evaluation.examples for score in scores)


def _add_scores(view: EncoderView, task: AbsTask, evaluation: Evaluation, cache: mteb.ResultCache) -> None:
    # Otherwise the samples that clustering draws would depend on earlier views and models.
    for each in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
        set_seed(each.seed)
        each.rng_state, each.np_rng = random.Random(each.seed), np.random.default_rng(each.seed)
    folder = cache.cache_path if has_examples(task) else None
    with recorded(task) as found:
        # With its cache, mteb would write the results of all subsets again after each of them.
        options = {"cache": None, "co2_tracker": False, "show_progress_bar": False}
        results = mteb.evaluate(view, task, prediction_folder=folder, **options)
    if results.exceptions:
        raise StoppedError(results.exceptions[0].exception)
    (result,) = results.task_results
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
