"""Evaluation of models on mteb's tasks, its benchmarks or local data, from options to scores and report."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mteb
from mteb.abstasks.abstask import AbsTask
from tqdm import tqdm

from training.common.errors import StoppedError, UserError
from training.common.outputs import locked
from training.common.run_folder import manifest_of, run_of
from training.evaluation.figures import find_log
from training.evaluation.models import EvaluatedModel, load_model, revisions_of, views_of
from training.evaluation.parallel import Job, evaluate_tasks
from training.evaluation.records import Evaluation, check_known, labels, load_evaluation
from training.evaluation.report import as_text, check_report_folder, view_table, write_report
from training.evaluation.scoring import evaluate_task, find_tasks, quietly
from training.evaluation.summary import known_rows, training_rows
from training.models.devices import choose_devices
from training.models.model_ref import find_model

logger = logging.getLogger("training")

# Embeddings kept for the next task: local tasks share texts.
_HELD_BYTES = 4 << 30


def evaluate(args: Namespace) -> None:
    """Evaluate models and write the report; see ``evaluate.py`` for the options."""
    if args.max_length < 1:
        raise UserError(f"--max-length must be at least 1, got {args.max_length}")
    if args.embedding_cache is not None and not args.embedding_cache > 0:
        raise UserError(f"--embedding-cache must be more than 0 GiB, got {args.embedding_cache:g}")
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
    which = (args.max_length, args.prompts, args.trust_remote_code)
    layers = None if args.layers is None else tuple(args.layers)
    done = []
    # A fault of one model does not cost the others.
    for (name, revision), shown in names.items():
        evaluation.failures.pop(f"{shown}: all", None)
        try:
            for rank in args.ranks:
                model = load_model(name, revision, *which, args.devices, layers, rank)
                views = {"dims": tuple(args.dims), "precisions": tuple(args.precisions)}
                with closing(model.store.encoder):
                    if args.embedding_cache is None:
                        evaluate_model(model, tasks, evaluation, args.output, **views)
                    else:
                        found = (tuple(args.tasks), args.benchmark, tuple(args.local))
                        job = Job((name, revision, *which, (), layers, rank), found, **views, output=args.output)
                        evaluate_tasks(job, model, tasks, evaluation, args.embedding_cache * 2**30)
                done += [record.label for record in model.records]
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
    views = views_of(model, dims, precisions)
    for record in model.records:
        evaluation.add_model(record)
    cache = mteb.ResultCache(output / "mteb")
    for task in (bar := tqdm(tasks, desc=label, unit="task")):
        bar.set_postfix_str(task.metadata.name)
        loaded_before = task.data_loaded
        with quietly():
            evaluate_task(label, task, views, evaluation, cache)
        if task.data_loaded and not loaded_before:
            task.unload_data()
        store.forget(_HELD_BYTES)
        if store.encoded:
            evaluation.add_model(replace(model.record, texts_per_second=store.encoded / store.seconds))
        evaluation.save(output)
    logger.info("%s: %d texts encoded in %.0f s", label, store.encoded, store.seconds)
