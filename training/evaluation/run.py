"""Evaluates models with mteb: its tasks, its benchmarks or local files, each width and precision from one encoding.

python training/evaluation/run.py MODEL [--tasks NAME ... | --benchmark NAME | --local FILE_OR_FOLDER ...]
    [--against NAME ...] [--dims D ...] [--precisions P ...] [--revision R ...] [--output runs/evaluation]
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mteb
from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from training.data.command import run_command
from training.errors import StoppedError, UserError, in_one_line
from training.evaluation.encoding import EmbeddingStore, EncoderView
from training.evaluation.local_tasks import local_tasks
from training.evaluation.records import PRECISIONS, Evaluation, ModelRecord, Score, bytes_per_vector
from training.model_identity import model_revision

__all__ = ["evaluate_model", "find_tasks", "main", "table"]

logger = logging.getLogger("training")

_MAX_LENGTH = 8192  # that of the published evaluation


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


def _load(name: str, revision: str | None, max_length: int) -> tuple[EmbeddingStore, ModelMeta, dict[str, Any]]:
    local = Path(name).is_dir()
    # What mteb keeps results by: a folder that was trained on, or a branch that moved, is another model.
    found = model_revision(name, "MODEL") if local or revision is None else revision
    try:
        model = SentenceTransformer(name, revision=None if local else found, trust_remote_code=local)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be loaded as a SentenceTransformer ({in_one_line(error)})") from None
    model.max_seq_length = min(max_length, model.max_seq_length or max_length)
    known = MODEL_REGISTRY.get(name)
    options = {} if known is None or not known.loader_kwargs else known.loader_kwargs
    if "prompts_dict" in options:
        prompts = {"prompts": options["prompts_dict"], "template": options["instruction_template"]}
    else:
        prompts = {}
        if not any(model.prompts.values()):
            logger.warning("%s has no prompts: queries and documents are encoded as they are", name)
    label = "/".join(Path(name).resolve().parts[-2:]) if local else name
    meta = known or ModelMeta.create_empty({"name": label})
    # So are embeddings of texts that are cut elsewhere.
    experiment = {} if max_length == _MAX_LENGTH else {"experiment_kwargs": {"max_length": max_length}}
    return EmbeddingStore(model), meta.model_copy(update={"revision": found, **experiment}), prompts


def _examples(task: Any, split: str, subset: str) -> int:
    """Queries, pairs or texts of a subset; 0 if mteb has let go of the data or never loaded them."""
    data = task.dataset or {}
    of_split = data.get(subset, data).get(split, ())
    return len(of_split["queries"]) if isinstance(of_split, dict) else len(of_split)


def _scores(record: ModelRecord, view: EncoderView, task: Any, result: Any) -> list[Score]:
    found = []
    for split, subsets in result.scores.items():
        for scores in subsets:
            found.append(
                Score(
                    record.label,
                    result.task_name,
                    task.metadata.type,
                    scores["hf_subset"],
                    tuple(scores["languages"]),
                    view.dimension,
                    view.precision,
                    task.metadata.main_score,
                    # As mteb's cache rounds, so that a resumed run gives the same.
                    round(float(scores["main_score"]), 6),
                    _examples(task, split, scores["hf_subset"]),
                    split,
                )
            )
    return found


def evaluate_model(
    name: str,
    tasks: Sequence[Any],
    evaluation: Evaluation,
    output: Path,
    *,
    revision: str | None = None,
    dims: Sequence[int] = (),
    precisions: Sequence[str] = ("float32",),
    max_length: int = _MAX_LENGTH,
) -> None:
    """Adds the scores of a model to an evaluation, and saves it after each task.

    What mteb's cache in ``output`` holds is not run again. A task that fails is noted in ``failures``.

    Raises:
        UserError: If the model cannot be loaded or a dimension is not one of its own.
    """
    store, meta, prompts = _load(name, revision, max_length)
    views = [
        EncoderView(store, meta, dim, precision, **prompts)
        for dim in (dims or [store.width])
        for precision in precisions
    ]
    record = ModelRecord(name, revision, sum(each.numel() for each in store.model.parameters()), store.width)
    evaluation.models.append(record)
    cache = mteb.ResultCache(output / "mteb")
    started = time.monotonic()
    for task in tqdm(tasks, desc=record.label):
        for view in views:
            try:
                results = mteb.evaluate(view, task, cache=cache, co2_tracker=False, show_progress_bar=False)
            except Exception as error:  # Whatever a task's data or code raises, other results must stay.
                reason = f"{type(error).__name__}: {in_one_line(error)}"
                logger.error("%s, task %s: %s", record.label, task.metadata.name, reason)
                evaluation.failures[task.metadata.name] = reason
                break
            for result in results.task_results:
                evaluation.scores += _scores(record, view, task, result)
        evaluation.save(output)
    logger.info("%s: %d texts encoded in %.0f s", record.label, store.encoded, time.monotonic() - started)


def table(evaluation: Evaluation) -> str:
    """Mean of the subsets by model, task and view, for a terminal."""
    groups: dict[tuple[str, str, int, str, str], list[float]] = {}
    for score in evaluation.scores:
        key = (score.model, score.task, score.dimension, score.precision, score.metric)
        groups.setdefault(key, []).append(score.value)
    lines = [f"{'task':<28}{'dims':>6} {'precision':<10}{'bytes':>7}{'score':>9}  metric, model"]
    for (model, task, dim, precision, metric), values in groups.items():
        mean = sum(values) / len(values)
        size = bytes_per_vector(dim, precision)
        lines.append(f"{task:<28}{dim:>6} {precision:<10}{size:>7}{mean:>9.4f}  {metric}, {model}")
    lines += [f"failed: {task}: {reason}" for task, reason in evaluation.failures.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub name")
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--benchmark")
    parser.add_argument("--local", nargs="+", default=[], help="parquet files of pairs, or folders: built or prepared")
    parser.add_argument("--against", nargs="+", default=[], help="further models")
    parser.add_argument("--dims", nargs="+", type=int, default=[])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["float32"])
    parser.add_argument("--revision", nargs="+", default=[None], help="revisions of MODEL, each evaluated")
    parser.add_argument("--max-length", type=int, default=_MAX_LENGTH, help="tokens of a text at most")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluation"))
    args = parser.parse_args(arguments)

    def work() -> None:
        tasks = find_tasks(args.tasks, args.benchmark, args.local)
        evaluation = Evaluation()
        models = [*((args.model, revision) for revision in args.revision), *((name, None) for name in args.against)]
        for name, revision in models:
            evaluate_model(
                name,
                tasks,
                evaluation,
                args.output,
                revision=revision,
                dims=args.dims,
                precisions=args.precisions,
                max_length=args.max_length,
            )
        sys.stdout.write(f"{table(evaluation)}\n\n{args.output}\n")
        if evaluation.failures:
            raise StoppedError(f"{len(evaluation.failures)} of {len(tasks)} tasks failed, see {args.output}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
