"""Evaluation of models on mteb's tasks, its benchmarks or local data, from options to table and report."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb

from training.common.errors import StoppedError, UserError
from training.common.outputs import locked
from training.common.run_folder import manifest_of, run_of
from training.evaluation.figures import find_log
from training.evaluation.local_tasks import local_tasks
from training.evaluation.models import load_model, revisions_of
from training.evaluation.records import Evaluation, check_known, labels, load_evaluation
from training.evaluation.report import as_text, check_report_folder, comparison_text, view_table, write_report
from training.evaluation.scoring import evaluate_model
from training.evaluation.summary import known_rows, training_rows
from training.models.model_ref import find_model

logger = logging.getLogger("training")

# A name and a revision.
Model = tuple[str, str | None]


def evaluate(args: Namespace) -> None:
    """Evaluate models and write the report; see ``evaluate.py`` for the options."""
    if args.max_length < 1:
        raise UserError(f"--max-length must be at least 1, got {args.max_length}")
    args.output = args.output or Path("runs/evaluation")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: there is a file of that name; give a folder")
    check_report_folder(args.output, [*map(Path, args.local), *([args.manifest] if args.manifest else [])])
    # Another command that evaluates into the folder would overwrite these scores with its own.
    with locked(args.output):
        _evaluate(args)


def _evaluate(args: Namespace) -> None:
    tasks = find_tasks(args.tasks, args.benchmark, args.local)
    evaluation = load_evaluation(args.output, missing_ok=True)
    revisions = [name for each in args.revision for name in (revisions_of(args.model) if each == "all" else [each])]
    models = [(args.model, revision) for revision in revisions or [None]] + [(name, None) for name in args.against]
    models = list(dict.fromkeys(models))
    check_report_folder(args.output, [Path(find_model(*model)[0]) for model in models])
    known = {*labels(evaluation), *map(_name, models)}
    for label in args.compare or ():
        # Labels end in the options that differ from the defaults.
        check_known("--compare", label.partition(" (")[0], (each.partition(" (")[0] for each in known))
    run = run_of(args.model)
    rows = training_rows(args.manifest) if args.manifest else known_rows(manifest_of(run) if run else None)
    done = _evaluate_models(args, models, tasks, evaluation)
    sys.stdout.write(f"{as_text(view_table(score for score in evaluation.scores if score.model in done))}\n\n")
    compared = None
    try:
        compared = args.compare and comparison_text(evaluation, args.compare)
    # If the models cannot be compared, there is a report all the same.
    finally:
        runs = [run] if run and find_log(run) else []
        page = write_report(evaluation, args.output, compare=compared and args.compare, rows=rows, runs=runs)
    sys.stdout.write(f"{compared}\n\n{page}\n" if compared else f"{page}\n")
    of_these = tuple(f"{name}: " for name in (*done, *map(_name, models)))
    if failed := [key for key in evaluation.failures if key.startswith(of_these)]:
        raise StoppedError(f"{len(failed)} of {len(tasks) * len(models)} tasks failed, see {args.output}")


def find_tasks(names: Sequence[str] = (), benchmark: str | None = None, local: Sequence[str] = ()) -> list[Any]:
    """Return the tasks of mteb by name, those of a benchmark, and those of local files and folders."""
    tasks = []
    if names:
        known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
        for name in names:
            check_known("task", name, known)
            tasks.append(mteb.get_task(name))
    if benchmark is not None:
        check_known("benchmark", benchmark, (each.name for each in mteb.get_benchmarks()))
        tasks += list(mteb.get_benchmark(benchmark).tasks)
    for path in map(Path, local):
        tasks += local_tasks(path)
    found = Counter(task.metadata.name for task in tasks)
    if twice := sorted(name for name, count in found.items() if count > 1):
        raise UserError(f"two tasks are called {', '.join(twice)}; name them once, or rename a local file")
    if not tasks:
        raise UserError("nothing to evaluate on; give --tasks, --benchmark or --local")
    return tasks


def _evaluate_models(
    args: Namespace, models: Sequence[Model], tasks: Sequence[Any], evaluation: Evaluation
) -> list[str]:
    """Evaluate all models; return the labels of those that could be. A fault of one does not cost the others."""
    done, dims, precisions = [], list(dict.fromkeys(args.dims)), list(dict.fromkeys(args.precisions))
    for name, revision in models:
        all_tasks = f"{_name((name, revision))}: all"
        evaluation.failures.pop(all_tasks, None)
        try:
            model = load_model(name, revision, args.max_length, args.prompts, args.trust_remote_code)
            evaluate_model(model, tasks, evaluation, args.output, dims=dims, precisions=precisions)
            done.append(model.record.label)
        except UserError as error:
            if len(models) == 1:
                raise
            logger.error("%s", error)
            evaluation.failures[all_tasks] = str(error)
            evaluation.save(args.output)
    if not done:
        raise UserError("none of the models could be evaluated; the reasons are above")
    return done


def _name(model: Model) -> str:
    return model[0] if model[1] is None else "@".join(model)
