"""Scores that a table, figure or comparison is about, and models that are checkpoints of one training."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from training.common.errors import UserError
from training.evaluation.records import PRECISIONS, Evaluation, ModelRecord, Score

# A word, a separator and the step: step-1000, stage2-checkpoint_200; step1000 is common, too. Digits at the end of a
# commit's hash follow no separator.
_REVISION = re.compile(r"(?P<before>|.*[-_/.])(?P<word>[a-z]+)(?:[-_/]|(?<=step))(?P<step>\d+)", re.IGNORECASE)
# Folders of a run. Other models are called something-2, too.
_FOLDER = re.compile(r"(?P<run>.+)/(?P<word>checkpoint)-(?P<step>\d+)")


def labels(evaluation: Evaluation) -> list[str]:
    """Return the labels of the models that have scores, in the order of the evaluation's models."""
    scored = dict.fromkeys(score.model for score in evaluation.scores)
    listed = [model.label for model in evaluation.models if model.label in scored]
    return list(dict.fromkeys([*listed, *scored]))


def model_scores(
    evaluation: Evaluation, model: str, dimension: int | None = None, precision: str = "float32"
) -> list[Score]:
    """Return the scores of one model at one dimension (default: the largest) and precision."""
    known = labels(evaluation)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4) or known[:10]
        raise UserError(f"no scores of model {model!r}; there are scores of {', '.join(near) or 'no model'}")
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    of_model = evaluation.select(model=model, precision=precision)
    dimensions = sorted({score.dimension for score in of_model}, reverse=True)
    if not dimensions:
        raise UserError(f"model {model!r} has no scores in {precision}; evaluate it with that precision")
    if dimension is not None and dimension not in dimensions:
        offered = ", ".join(map(str, dimensions))
        raise UserError(f"model {model!r} has no {precision} scores of {dimension} dimensions; there are {offered}")
    return evaluation.select(of_model, dimension=dimensions[0] if dimension is None else dimension)


def shared_scores(evaluation: Evaluation, models: Iterable[str]) -> dict[str, list[Score]]:
    """Return the float32 scores at full width, by model, of the tasks that all models have; empty if there are none.

    Models without such scores are ignored.
    """
    found = {
        model: model_scores(evaluation, model)
        for model in models
        if evaluation.select(model=model, precision="float32")
    }
    tasks = set.intersection(*(set(by_task(scores)) for scores in found.values())) if found else set()
    if not tasks:
        return {}
    return {model: [score for score in scores if score.task in tasks] for model, scores in found.items()}


def by_task(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Return the scores of each task, sorted by split and subset."""
    tasks: dict[str, list[Score]] = {}
    for score in scores:
        tasks.setdefault(score.task, []).append(score)
    return {task: sorted(found, key=lambda score: (score.split, score.subset)) for task, found in tasks.items()}


def task_mean(scores: Iterable[Score]) -> float:
    """Return the macro mean: the mean over tasks of their means over subsets, as MTEB averages."""
    return fmean(fmean(score.value for score in subsets) for subsets in by_task(scores).values())


def view_means(scores: Iterable[Score]) -> dict[tuple[str, str, int, str, str], float]:
    """Return the means over subsets by model, task, dimension, precision and metric."""
    groups: dict[tuple[str, str, int, str, str], list[float]] = {}
    for score in scores:
        key = (score.model, score.task, score.dimension, score.precision, score.metric)
        groups.setdefault(key, []).append(score.value)
    return {key: fmean(values) for key, values in groups.items()}


@dataclass(frozen=True)
class Sweep:
    """Checkpoints of one training: labels by step (or checkpoint, epoch, …), and that of the finished model."""

    name: str
    unit: str
    steps: list[tuple[int, str]]
    final: str | None


def find_sweeps(evaluation: Evaluation) -> list[Sweep]:
    """Return the trainings of which two or more checkpoints were scored.

    A step is the number at the end of a revision, or of a folder ``checkpoint-N``. The finished model of such a folder
    is the run's folder or ``model`` in it.
    """
    scored = set(labels(evaluation))
    records = [record for record in evaluation.models if record.label in scored]
    plain = {record.name.rstrip("/"): record.label for record in records if record.revision is None}
    steps: dict[tuple[str, str, str], dict[int, str]] = {}
    for record in records:
        if found := _series_and_step(record):
            series, step = found
            steps.setdefault(series, {})[step] = record.label
    return [
        Sweep(
            f"{model}@{before}{unit}" if before else model,
            unit,
            sorted(found.items()),
            plain.get(model) or plain.get(f"{model}/model"),
        )
        for (model, before, unit), found in steps.items()
        if len(found) > 1
    ]


def _series_and_step(record: ModelRecord) -> tuple[tuple[str, str, str], int] | None:
    """Return (model, what comes before the word in its revision, word) and the step."""
    name = record.name.rstrip("/")
    if record.revision is not None:
        found = _REVISION.fullmatch(record.revision)
        return found and ((name, found["before"], found["word"]), int(found["step"]))
    found = _FOLDER.fullmatch(name)
    return found and ((found["run"], "", found["word"]), int(found["step"]))


def finished_models(evaluation: Evaluation) -> list[str]:
    """Return labels of scored models without intermediate checkpoints; an unfinished run has its last one."""
    passed = set()
    for sweep in find_sweeps(evaluation):
        of_sweep = [label for _, label in sweep.steps]
        passed |= set(of_sweep if sweep.final else of_sweep[:-1])
    return [label for label in labels(evaluation) if label not in passed]
