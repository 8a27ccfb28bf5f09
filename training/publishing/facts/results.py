"""What a model scored, as the tables of its card: nothing that its evaluation does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hub_cards.markdown import code
from training.common.languages import language_name
from training.evaluation.figures.dimensions import dimension_points
from training.evaluation.records import Evaluation, Score, bytes_per_vector
from training.evaluation.resources import SHARES, resource_class
from training.evaluation.selection import labels, model_scores, shared_scores, task_mean
from training.evaluation.significance import Interval, bootstrap_interval, examples_of
from training.evaluation.summary import GroupScore, Summary, TaskScore, languages_of, summarize
from training.evaluation.sweeps import finished_models
from training.publishing.record import ModelRelease

# A class by its share of the training rows.
_CLASS_NAMES = {
    "high": f"{100 * SHARES['high']:g} % of the training rows or more",
    "middle": f"{100 * SHARES['middle']:g} % or more",
    "low": "fewer",
    "none": "none",
}


def own_label(evaluation: Evaluation, name: str) -> str | None:
    """The label under which the release was scored, that without options before others; None if it was not."""
    scored = set(labels(evaluation))
    own = [each for each in evaluation.models if each.name == name and each.revision is None and each.label in scored]
    own.sort(key=lambda record: bool(record.options))
    float32 = [each.label for each in own if evaluation.select(model=each.label, precision="float32")]
    return float32[0] if float32 else None


def results_facts(release: ModelRelease, evaluation: Evaluation, label: str) -> dict[str, Any]:
    """Rows of the tables of results, at full width in float32.

    Args:
        release: The model.
        evaluation: Its scores.
        label: Its label among them.
    """
    summary = summarize(evaluation, label, release.language_rows or None)
    scores = model_scores(evaluation, label)
    languages = summary.languages
    return {
        "width": summary.dimension,
        "tasks": [_task(task) for task in summary.tasks],
        "means": _means(summary),
        "groups": [
            {"title": title, "name": name, "rows": _group_rows(evaluation, scores, groups, member)}
            for title, name, groups, member in _groups(release, summary)
            if groups
        ],
        "languages": [
            [code(name), language_name(name.partition("-")[0]), score, interval, examples]
            for name, score, interval, _, examples in _group_rows(evaluation, scores, languages, str)
        ],
        "worst": [f"{code(group.name)} ({group.examples:,})" for group in summary.worst]
        if len(languages) > len(summary.worst)
        else [],
        "others": _others(evaluation, label),
    }


def _task(task: TaskScore) -> list[Any]:
    score = _score(task.value, task.interval)
    return [code(task.task), task.task_type, code(task.metric), *score, task.subsets, task.examples]


def _score(value: float, interval: Interval | None) -> list[str | None]:
    # Examples that all score the same, or one alone, have an interval of no width, which says nothing.
    known = interval is not None and interval.low < interval.high
    return [f"{100 * value:.1f}", f"{100 * interval.low:.1f} – {100 * interval.high:.1f}" if known else None]


def _means(summary: Summary) -> list[list[str]]:
    means = [("tasks", summary.macro)] if len(summary.tasks) > 1 else []
    means.append(("examples", summary.micro))
    if summary.language_macro is not None:
        means.append(("languages", summary.language_macro))
    return [[name, f"{100 * value:.1f}"] for name, value in means]


_Group = tuple[str, str, Sequence[GroupScore], Callable[[str], str]]


def _groups(release: ModelRelease, summary: Summary) -> list[_Group]:
    """Title, name of the first column, the groups, and how a language's group is found."""
    largest_first = sorted(summary.scripts, key=lambda group: (-group.languages, group.name))
    rows = release.language_rows
    return [
        ("By script", "script", largest_first, lambda language: language.partition("-")[2] or "unknown"),
        ("By training data", "rows", summary.classes, lambda language: resource_class(language, rows)),
    ]


def _group_rows(
    evaluation: Evaluation, scores: Sequence[Score], groups: Sequence[GroupScore], member: Callable[[str], str]
) -> list[list[Any]]:
    rows = []
    for group in groups:
        own = [score for score in scores if any(member(language) == group.name for language in languages_of(score))]
        interval = _interval(evaluation, own, group.macro)
        rows.append(
            [_CLASS_NAMES.get(group.name, group.name), *_score(group.macro, interval), group.languages, group.examples]
        )
    return rows


def _interval(evaluation: Evaluation, scores: Sequence[Score], value: float) -> Interval | None:
    """The interval of a mean; None where examples have no scores, or the value is a mean of another kind."""
    examples = examples_of(evaluation, scores)
    if examples is None:
        return None
    interval = bootstrap_interval(examples)
    return interval if abs(interval.mean - value) < 1e-4 else None


def _others(evaluation: Evaluation, label: str) -> list[list[Any]]:
    """The models that stand beside the release in its evaluation, over the tasks that all of them have."""
    scores = shared_scores(evaluation, dict.fromkeys([label, *finished_models(evaluation)]))
    if len(scores) < 2:
        return []
    records = {record.label: record for record in evaluation.models}
    ordered = sorted(scores, key=lambda model: -task_mean(scores[model]))
    return [
        [
            code(model),
            records[model].parameters if model in records else None,
            scores[model][0].dimension or None,
            f"{100 * task_mean(scores[model]):.1f}",
        ]
        for model in ordered
    ]


def truncation_facts(evaluation: Evaluation, label: str, width: int | None) -> dict[str, Any] | None:
    """Quality by width and precision; None if the model was scored at one of them alone.

    Args:
        evaluation: The scores.
        label: Label of the model.
        width: Whose share of the full score is told; None for none.

    Returns:
        ``precisions``; ``rows``, of a width and, for each precision, bytes of a vector and the score; ``share``, in
        percent, None where it is not known.
    """
    points = dimension_points(evaluation, label)
    if sum(map(len, points.values())) < 2:
        return None
    scores = {(precision, width): value for precision, line in points.items() for width, value in line}
    widths = sorted({width for _, width in scores}, reverse=True)
    rows = []
    for each in widths:
        row: list[Any] = [each]
        for precision in points:
            value = scores.get((precision, each))
            row += [None, None] if value is None else [bytes_per_vector(each, precision), f"{value:.1f}"]
        rows.append(row)
    full, cut = scores.get(("float32", widths[0])), scores.get(("float32", width))
    share = f"{100 * cut / full:.0f}" if full and cut is not None else None
    return {"precisions": list(points), "rows": rows, "share": share}
