"""Quality against what it costs: parameters and encoding rate, with the front of the models that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation.figures.style import new_figure, save, short_label
from training.evaluation.records import Evaluation, Score
from training.evaluation.selection import by_task, labels, model_scores, task_mean

__all__ = ["draw_pareto", "pareto_front"]


@dataclass(frozen=True)
class _Point:
    name: str
    cost: float
    quality: float


def pareto_front(points: Sequence[tuple[float, float]], more_is_better: bool = False) -> list[int]:
    """Positions of the points that no other beats, from the lowest x to the highest.

    One point beats another if it is no worse in both and better in one.

    Args:
        points: x and quality of each point; more quality is better.
        more_is_better: Whether more of x is better, too.
    """
    sign = -1 if more_is_better else 1
    front: list[int] = []
    best = float("-inf")
    for place in sorted(range(len(points)), key=lambda i: (sign * points[i][0], -points[i][1])):
        if points[place][1] > best or (front and points[place] == points[front[-1]]):
            front.append(place)
            best = points[place][1]
    return sorted(front, key=lambda i: points[i])


def draw_pareto(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes ``pareto.svg`` and ``.png``: float32 at full width, over the tasks that all models have.

    Returns:
        The files; none where fewer than two models have a known size or rate, or they share no task.

    Raises:
        UserError: If matplotlib is missing.
    """
    quality = _quality(evaluation)
    records = [record for record in evaluation.models if record.label in quality]
    panels = [
        (points, label, more)
        for attribute, label, more in (
            ("parameters", "parameters (log scale)", False),
            ("texts_per_second", "texts encoded per second (log scale)", True),
        )
        if len(points := _points(records, attribute, quality)) > 1
    ]
    if not panels:
        return []
    figure = new_figure(5.6 * len(panels), 4.6)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (points, label, more) in zip(grid, panels, strict=True):
        _draw(axes, points, more)
        axes.set_xlabel(label)
    grid[0].set_ylabel("mean score over tasks (%)")
    return save(figure, folder, "pareto")


def _quality(evaluation: Evaluation) -> dict[str, float]:
    """Mean score in percent over the tasks that all models have, by label."""
    scores: dict[str, list[Score]] = {
        label: model_scores(evaluation, label)
        for label in labels(evaluation)
        if evaluation.select(model=label, precision="float32")
    }
    tasks = set.intersection(*(set(by_task(found)) for found in scores.values())) if scores else set()
    if not tasks:
        return {}
    return {label: 100 * task_mean(score for score in found if score.task in tasks) for label, found in scores.items()}


def _points(records: Sequence[Any], attribute: str, quality: dict[str, float]) -> list[_Point]:
    return [
        _Point(short_label(record.label), cost, quality[record.label])
        for record in records
        if (cost := getattr(record, attribute))
    ]


def _draw(axes: Any, points: Sequence[_Point], more_is_better: bool) -> None:
    """Filled markers and a line of steps for the front, hollow markers for what it beats."""
    places = [(point.cost, point.quality) for point in points]
    front = pareto_front(places, more_is_better)
    axes.set_xscale("log")
    beaten = [place for number, place in enumerate(places) if number not in front]
    axes.plot(
        [places[i][0] for i in front],
        [places[i][1] for i in front],
        linestyle="--",
        drawstyle="steps-pre" if more_is_better else "steps-post",
        marker="o",
        color="black",
        label="Pareto front",
    )
    if beaten:
        axes.plot(
            [x for x, _ in beaten], [y for _, y in beaten], "s", color="0.4", markerfacecolor="white", label="beaten"
        )
    ordered = sorted(points, key=lambda point: point.cost)
    for number, point in enumerate(ordered):
        _annotate(axes, point, above=number % 2 == 0)
    axes.margins(x=0.22, y=0.18)
    axes.grid(color="0.88")
    axes.legend(fontsize=8, loc="best")


def _annotate(axes: Any, point: _Point, above: bool) -> None:
    axes.annotate(
        point.name,
        (point.cost, point.quality),
        xytext=(0, 8 if above else -15),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )
