"""What an evaluation says, as tables of numbers and words; Markdown and HTML write the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from training.evaluation.compare import Comparison
from training.evaluation.records import PRECISIONS, Evaluation, Score, bytes_per_vector
from training.evaluation.summary import GroupScore, Summary, TaskScore

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: What it shows.
        head: Names of its columns, with units.
        rows: Cells; floats are scores in percent, None is unknown.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def evaluation_tables(evaluation: Evaluation) -> Iterator[Table]:
    """Models, scores by width and precision, and what failed."""
    models = [
        (each.label, each.parameters, each.dimension, _rounded(each.texts_per_second)) for each in evaluation.models
    ]
    yield Table("Models", ("model", "parameters", "dimensions", "texts per second"), models)
    yield _views(evaluation.scores)
    if evaluation.failures:
        yield Table("Failed", ("model and task", "reason"), list(evaluation.failures.items()))


def _views(scores: Sequence[Score]) -> Table:
    groups: dict[tuple[str, str, int, str], list[float]] = {}
    for score in scores:
        groups.setdefault((score.model, score.task, score.dimension, score.precision), []).append(score.value)
    order = sorted(groups, key=lambda view: (view[1], view[0], -view[2], list(PRECISIONS).index(view[3])))
    # A baseline such as TF-IDF has no width.
    rows = [
        (model, task, width or None, precision, bytes_per_vector(width, precision) or None, 100 * fmean(groups[view]))
        for view in order
        for model, task, width, precision in [view]
    ]
    head = ("model", "task", "dimensions", "precision", "bytes per vector", "score (%), mean over subsets")
    return Table("Dimensions and precisions", head, rows)


def summary_tables(summary: Summary) -> Iterator[Table]:
    """One model's means, tasks, languages, scripts, classes and bitexts."""
    of_model = f"{summary.model}, {summary.dimension} dimensions, {summary.precision}"
    means: list[tuple[Cell, ...]] = [
        ("macro: mean over tasks", 100 * summary.macro),
        ("micro: mean over examples", 100 * summary.micro),
        ("mean over languages", None if summary.language_macro is None else 100 * summary.language_macro),
    ]
    yield Table(f"{of_model}: means", ("mean", "score (%)"), means)
    head = ("task", "type", "metric", "score (%)", "95 % interval, from", "to", "subsets", "examples")
    yield Table(f"{of_model}: tasks", head, [_task(task) for task in summary.tasks])
    groups = {
        f"the {len(summary.worst)} worst languages": summary.worst if len(summary.languages) > 10 else [],
        "languages": summary.languages,
        "scripts": summary.scripts,
        "resource classes, by share of training rows": summary.classes,
        "bitexts": summary.bitext,
    }
    for name, found in groups.items():
        if found:
            head = ("name", "macro (%)", "micro (%)", "languages", "examples")
            yield Table(f"{of_model}: {name}", head, [_group(each) for each in found])


def comparison_table(comparison: Comparison) -> Table:
    """Two models, task by task and overall."""
    rows: list[tuple[Cell, ...]] = []
    for task in comparison.tasks:
        ends, p = (None, None), "" if task.p_adjusted is None else f"{task.p_adjusted:.3g}"
        if task.test is not None:
            ends = (100 * task.test.difference.low, 100 * task.test.difference.high)
        scores = (100 * task.first, 100 * task.second, 100 * (task.first - task.second))
        rows.append((task.task, *scores, *ends, p, task.verdict))
    if (test := comparison.overall) is not None:
        scores = (100 * test.first, 100 * test.second, 100 * test.difference.mean)
        ends = (100 * test.difference.low, 100 * test.difference.high)
        rows.append(("overall", *scores, *ends, f"{test.p_value:.3g}", comparison.verdict))
    interval = f"{100 * comparison.level:g} % interval, from"
    head = ("task", "first (%)", "second (%)", "difference (points)", interval, "to", "p (Holm)", "verdict")
    return Table(f"{comparison.first} (first) against {comparison.second} (second)", head, rows)


def _task(task: TaskScore) -> tuple[Cell, ...]:
    ends = (None, None) if task.interval is None else (100 * task.interval.low, 100 * task.interval.high)
    return (task.task, task.task_type, task.metric, 100 * task.value, *ends, task.subsets, task.examples)


def _group(group: GroupScore) -> tuple[Cell, ...]:
    return (group.name, 100 * group.macro, 100 * group.micro, group.languages, group.examples)


def _rounded(rate: float | None) -> int | None:
    return None if rate is None else round(rate)
