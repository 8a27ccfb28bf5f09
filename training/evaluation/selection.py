"""Which scores of an evaluation a table or a comparison is about."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from statistics import fmean

from training.common.errors import UserError
from training.evaluation.records import PRECISIONS, Evaluation, Score


def labels(evaluation: Evaluation) -> list[str]:
    """Labels of the models that have scores, those of the evaluation's own list first."""
    scored = dict.fromkeys(score.model for score in evaluation.scores)
    listed = [model.label for model in evaluation.models if model.label in scored]
    return list(dict.fromkeys([*listed, *scored]))


def model_scores(
    evaluation: Evaluation, model: str, dimension: int | None = None, precision: str = "float32"
) -> list[Score]:
    """The scores of one model at one dimension and precision.

    Args:
        evaluation: The evaluation.
        model: Label of the model.
        dimension: Leading dimensions; the most that the model was scored with if None.
        precision: One of ``PRECISIONS``.

    Raises:
        UserError: If the model has no such scores.
    """
    known = labels(evaluation)
    if model not in known:
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4) or known[:10]
        raise UserError(f"no scores of model {model!r}; there are scores of {', '.join(near) or 'no model'}")
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    of_model = evaluation.select(model=model, precision=precision)
    there = sorted({score.dimension for score in of_model}, reverse=True)
    if not there:
        raise UserError(f"model {model!r} has no scores in {precision}; evaluate it with that precision")
    if dimension is not None and dimension not in there:
        offered = ", ".join(map(str, there))
        raise UserError(f"model {model!r} has no {precision} scores of {dimension} dimensions; there are {offered}")
    return evaluation.select(of_model, dimension=there[0] if dimension is None else dimension)


def shared_scores(evaluation: Evaluation, models: Iterable[str]) -> dict[str, list[Score]]:
    """The float32 scores at full width, by model, of the tasks that all of the models have.

    Models without such scores do not count. Where the others share no task, nothing is returned.
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
    """The scores of each task, its subsets in order."""
    tasks: dict[str, list[Score]] = {}
    for score in scores:
        tasks.setdefault(score.task, []).append(score)
    return {task: sorted(found, key=lambda score: (score.split, score.subset)) for task, found in tasks.items()}


def task_mean(scores: Iterable[Score]) -> float:
    """Macro mean: of the tasks' means over their subsets, as MTEB averages."""
    return fmean(fmean(score.value for score in subsets) for subsets in by_task(scores).values())
