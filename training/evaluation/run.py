"""Evaluates models with mteb: its tasks, its benchmarks or local files, each width and precision from one encoding.

python training/evaluation/run.py MODEL [--tasks NAME ... | --benchmark NAME | --local PLACE ...]
    [--against NAME ...] [--dims D ...] [--precisions P ...] [--revision R ...] [--output runs/evaluation]

Ends in a table and in report.html, with all that was evaluated into the same --output before.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.common.command import require, run_command

if __name__ == "__main__":
    require("mteb", "eval")

import mteb

from training.common.errors import StoppedError, UserError
from training.common.outputs import locked
from training.common.run_folder import manifest_of, run_of
from training.evaluation.figures.curves import find_log
from training.evaluation.local_tasks import local_tasks
from training.evaluation.models import DEFAULT_MAX_LENGTH, load_model
from training.evaluation.places import revisions_of
from training.evaluation.records import PRECISIONS, Evaluation, bytes_per_vector, load_evaluation
from training.evaluation.report import check_report_folder, comparison_text, write_report
from training.evaluation.resources import known_rows, training_rows
from training.evaluation.scoring import evaluate_model
from training.evaluation.selection import labels
from training.models.reference import find_model

logger = logging.getLogger("training")

# A name and a revision.
Model = tuple[str, str | None]


def _unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "see mteb's documentation for the names"
    return UserError(f"{kind} {name!r} is unknown; {hint}")


def find_tasks(names: Sequence[str] = (), benchmark: str | None = None, local: Sequence[str] = ()) -> list[Any]:
    """The tasks asked for.

    Raises:
        UserError: If a name is unknown, with near ones, or a local file cannot be used.
    """
    tasks = []
    if names:
        known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
        for name in names:
            if name not in known:
                raise _unknown("task", name, known)
        tasks += [mteb.get_task(name) for name in names]
    if benchmark is not None:
        known = [each.name for each in mteb.get_benchmarks()]
        if benchmark not in known:
            raise _unknown("benchmark", benchmark, known)
        tasks += list(mteb.get_benchmark(benchmark).tasks)
    for place in map(Path, local):
        tasks += local_tasks(place)
    names = [task.metadata.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two tasks are called {', '.join(twice)}; name them once, or rename a local file")
    if not tasks:
        raise UserError("nothing to evaluate on; give --tasks, --benchmark or --local")
    return tasks


def table(evaluation: Evaluation, models: Sequence[str]) -> str:
    """Mean of the subsets by task, view and model, for a terminal.

    Args:
        evaluation: The evaluation.
        models: Labels of the models that are shown.
    """
    groups: dict[tuple[str, str, int, str, str], list[float]] = {}
    for score in evaluation.scores:
        if score.model in models:
            key = (score.model, score.task, score.dimension, score.precision, score.metric)
            groups.setdefault(key, []).append(score.value)
    lines = [f"{'task':<28}{'dims':>6} {'precision':<10}{'bytes':>7}{'score':>9}  metric, model"]
    for (model, task, dim, precision, metric), values in groups.items():
        mean = sum(values) / len(values)
        size = bytes_per_vector(dim, precision)
        lines.append(f"{task:<28}{dim:>6} {precision:<10}{size:>7}{mean:>9.4f}  {metric}, {model}")
    lines += [f"failed: {which}: {reason}" for which, reason in evaluation.failures.items()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a run or a Hub name")
    what = parser.add_argument_group("tasks")
    what.add_argument("--tasks", nargs="+", default=[])
    what.add_argument("--benchmark")
    what.add_argument("--local", nargs="+", default=[], help="parquet files of pairs, or folders: built or prepared")
    views = parser.add_argument_group("models and views")
    views.add_argument("--against", nargs="+", default=[], help="further models")
    views.add_argument("--revision", nargs="+", default=[], help="of MODEL, each evaluated; 'all' for every one")
    views.add_argument("--dims", nargs="+", type=int, default=[], help="leading dimensions; the full width if left out")
    views.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["float32"])
    views.add_argument("--max-length", type=int, default=DEFAULT_MAX_LENGTH, help="tokens of a text at most")
    views.add_argument(
        "--prompts",
        choices=["auto", "published", "model"],
        default="auto",
        help="before queries: F2LLM-v2's for mteb's tasks, the model's own, or what fits",
    )
    views.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with a model; it can do and read all that you can, your Hub token included",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--compare", nargs=2, metavar=("A", "B"), help="test two models by the labels of the tables")
    report.add_argument("--manifest", type=Path, help="of the training, for the resource classes; MODEL's run's own")
    report.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    return parser


def _check(args: argparse.Namespace) -> None:
    """Finds what can be found faulty before the first text is encoded."""
    if args.max_length < 1:
        raise UserError(f"--max-length must be at least 1, got {args.max_length}")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output}: there is a file of that name; give a folder")
    check_report_folder(args.output, [*map(Path, args.local), *([args.manifest] if args.manifest else [])])


def _check_compared(evaluation: Evaluation, models: Sequence[Model], args: argparse.Namespace) -> None:
    known = {*labels(evaluation), *(name if at is None else f"{name}@{at}" for name, at in models)}
    for label in args.compare or ():
        if not any(label == each or label.startswith(f"{each} (") for each in known):
            near = difflib.get_close_matches(label, known, n=3, cutoff=0.4) or sorted(known)[:10]
            raise UserError(f"--compare {label!r}: no such model; there are {', '.join(near)}")


def _models(args: argparse.Namespace) -> list[Model]:
    """Names and revisions, each once."""
    revisions = [name for each in args.revision for name in (revisions_of(args.model) if each == "all" else [each])]
    return list(
        dict.fromkeys(
            [*((args.model, revision) for revision in revisions or [None]), *((name, None) for name in args.against)]
        )
    )


def _whole(name: str, revision: str | None) -> str:
    """What stands for all tasks of a model among the failures."""
    return f"{name}: all" if revision is None else f"{name}@{revision}: all"


def _evaluate(
    args: argparse.Namespace, models: Sequence[Model], tasks: Sequence[Any], evaluation: Evaluation
) -> list[str]:
    """Evaluates all models and returns the labels of those that could be; a fault of one does not cost the others."""
    done, dims, precisions = [], list(dict.fromkeys(args.dims)), list(dict.fromkeys(args.precisions))
    for name, revision in models:
        evaluation.failures.pop(_whole(name, revision), None)
        try:
            model = load_model(name, revision, args.max_length, args.prompts, args.trust_remote_code)
            evaluate_model(model, tasks, evaluation, args.output, dims=dims, precisions=precisions)
            done.append(model.record.label)
        except UserError as error:
            if len(models) == 1:
                raise
            logger.error("%s", error)
            evaluation.failures[_whole(name, revision)] = str(error)
            evaluation.save(args.output)
    if not done:
        raise UserError("none of the models could be evaluated; the reasons are above")
    return done


def _work(args: argparse.Namespace) -> None:
    _check(args)
    # Another command that evaluates into the folder would overwrite these scores with its own.
    with locked(args.output):
        _evaluate_and_report(args)


def _evaluate_and_report(args: argparse.Namespace) -> None:
    tasks = find_tasks(args.tasks, args.benchmark, args.local)
    evaluation = load_evaluation(args.output, missing_ok=True)
    models = _models(args)
    check_report_folder(args.output, [Path(find_model(*place)[0]) for place in models])
    _check_compared(evaluation, models, args)
    run = run_of(args.model)
    rows = training_rows(args.manifest) if args.manifest else known_rows(manifest_of(run) if run else None)
    done = _evaluate(args, models, tasks, evaluation)
    sys.stdout.write(f"{table(evaluation, done)}\n\n")
    compared, fault = None, None
    try:
        if args.compare:
            compared = comparison_text(evaluation, *args.compare)
    except UserError as error:
        fault = error
    page = write_report(
        evaluation,
        args.output,
        compare=tuple(args.compare) if compared else None,
        rows=rows,
        runs=[run] if run and find_log(run) else [],
    )
    sys.stdout.write(f"{compared}\n\n{page}\n" if compared else f"{page}\n")
    if fault is not None:
        raise fault
    of_these = (*(f"{label}: " for label in done), *(_whole(*model) for model in models))
    if failed := [key for key in evaluation.failures if key.startswith(of_these)]:
        raise StoppedError(f"{len(failed)} of {len(tasks) * len(models)} tasks failed, see {args.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    args = _parser().parse_args(arguments)
    return run_command(lambda: _work(args))


if __name__ == "__main__":
    sys.exit(main())
