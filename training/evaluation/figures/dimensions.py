"""Quality against the dimensions and the bytes of a stored vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from training.evaluation.figures.style import LINES, new_figure, save, shortened
from training.evaluation.records import PRECISIONS, Evaluation, bytes_per_vector
from training.evaluation.selection import by_task, task_mean
from training.evaluation.sweeps import finished_models

_MOST_MODELS = 6

Points = dict[str, list[tuple[int, float]]]


def dimension_points(evaluation: Evaluation, model: str) -> Points:
    """By precision, the dimensions and the mean over tasks; only tasks scored at every one of them count."""
    grouped: dict[tuple[str, int], list[Any]] = {}
    for score in evaluation.select(model=model):
        grouped.setdefault((score.precision, score.dimension), []).append(score)
    tasks = set.intersection(*(set(by_task(scores)) for scores in grouped.values())) if grouped else set()
    points: Points = {}
    for precision in PRECISIONS:
        for dimension in sorted(dimension for name, dimension in grouped if name == precision):
            scores = [score for score in grouped[precision, dimension] if score.task in tasks]
            if scores:
                points.setdefault(precision, []).append((dimension, 100 * task_mean(scores)))
    return points


def draw_dimensions(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes ``dimensions.svg`` and ``.png``: a row a model, a line a precision.

    Returns:
        The files; none where no model was scored at two dimensions or precisions.

    Raises:
        UserError: If matplotlib is missing.
    """
    figure = dimensions_figure(evaluation)
    return [] if figure is None else save(figure, folder, "dimensions")


def dimensions_figure(evaluation: Evaluation) -> Any:
    """The figure; None where no model was scored at two dimensions or precisions.

    Raises:
        UserError: If matplotlib is missing.
    """
    found = {model: dimension_points(evaluation, model) for model in finished_models(evaluation)}
    swept = {model: points for model, points in found.items() if sum(map(len, points.values())) > 1}
    shown = list(swept.items())[:_MOST_MODELS]
    if not shown:
        return None
    figure = new_figure(10, 3.4 * len(shown) + 0.4)
    grid = figure.subplots(len(shown), 2, squeeze=False, sharey="row")
    for (left, right), (model, points) in zip(grid, shown, strict=True):
        _draw(left, points, "dimensions kept")
        sizes = {
            precision: [(bytes_per_vector(dimension, precision), value) for dimension, value in line]
            for precision, line in points.items()
        }
        _draw(right, sizes, "bytes per vector")
        left.set_title(shortened(model, 60), fontsize=11, loc="left")
        left.set_ylabel("mean score over tasks (%)")
        left.legend(title="precision", fontsize=9)
    if len(swept) > len(shown):
        figure.suptitle(f"{len(shown)} of {len(swept)} models", fontsize=10)
    return figure


def _draw(axes: Any, points: Points, label: str) -> None:
    for precision, line in points.items():
        style = LINES[list(PRECISIONS).index(precision)]
        axes.plot([x for x, _ in line], [y for _, y in line], label=precision, markersize=5, **style)
    ticks = _ticks({x for line in points.values() for x, _ in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], **_turned(ticks))
    axes.xaxis.minorticks_off()
    axes.set_xlabel(f"{label} (log scale)")
    axes.grid(color="0.88")


def _ticks(values: Iterable[int]) -> list[int]:
    """The values but those whose label would run into that of a larger one."""
    kept: list[int] = []
    for value in sorted(values, reverse=True):
        if not kept or kept[0] >= 1.5 * value:
            kept.insert(0, value)
    return kept


def _turned(ticks: Sequence[int]) -> dict[str, Any]:
    return {"rotation": 45, "ha": "right", "fontsize": 8} if len(ticks) > 7 else {}
