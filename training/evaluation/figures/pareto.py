"""Quality against what it costs: parameters and encoding rate, with the front of the models that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from training.evaluation.figures.labels import FONT_SIZE, Place, draw_labels, find_places
from training.evaluation.figures.style import new_figure, save, short_labels
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.selection import shared_scores, task_mean
from training.evaluation.sweeps import finished_models

# By attribute of a model: what the axis says, and whether more of it is better.
_COSTS = {"parameters": ("parameters", False), "texts_per_second": ("texts encoded per second", True)}

_Points = list[tuple[float, float]]


@dataclass(frozen=True)
class _Model:
    name: str
    record: ModelRecord
    quality: float


@dataclass(frozen=True)
class _Panel:
    """Axes, the positions of their models among all, where they lie, and the corners of the front."""

    axes: Any
    models: list[int]
    points: _Points
    path: _Points


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
    figure = pareto_figure(evaluation)
    return [] if figure is None else save(figure, folder, "pareto")


def pareto_figure(evaluation: Evaluation) -> Any:
    """The figure, with names beside the points or, where they would hide something, numbers and a list.

    Returns:
        The figure; None where there is nothing to draw.

    Raises:
        UserError: If matplotlib is missing.
    """
    models = _models(evaluation)
    costs = [cost for cost in _COSTS if sum(bool(getattr(model.record, cost)) for model in models) > 1]
    if not costs:
        return None
    figure = new_figure(5.6 * len(costs), 4.8)
    grid = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    panels = [_draw(axes, models, cost) for axes, cost in zip(grid, costs, strict=True)]
    grid[0].set_ylabel("mean score over tasks (%)")
    lines = {line.get_label(): line for axes in grid for line in axes.get_lines()}
    figure.legend(handles=list(lines.values()), fontsize=9, loc="outside upper left", ncols=len(lines))
    _label(figure, panels, [model.name for model in models])
    return figure


def _models(evaluation: Evaluation) -> list[_Model]:
    """The models that share tasks, from the highest mean score to the lowest."""
    scores = shared_scores(evaluation, finished_models(evaluation))
    records = [record for record in evaluation.models if record.label in scores]
    names = short_labels([record.label for record in records], most=32)
    found = [
        _Model(name, record, 100 * task_mean(scores[record.label])) for name, record in zip(names, records, strict=True)
    ]
    return sorted(found, key=lambda model: -model.quality)


def _draw(axes: Any, models: Sequence[_Model], cost: str) -> _Panel:
    """Filled markers and a line of steps for the front, hollow markers for what it beats."""
    label, more_is_better = _COSTS[cost]
    known = [number for number, model in enumerate(models) if getattr(model.record, cost)]
    points = [(float(getattr(models[number].record, cost)), models[number].quality) for number in known]
    chosen = pareto_front(points, more_is_better)
    front = [points[place] for place in chosen]
    beaten = [point for place, point in enumerate(points) if place not in chosen]
    steps = "steps-pre" if more_is_better else "steps-post"
    style = {"linestyle": "--", "drawstyle": steps, "marker": "o", "color": "black"}
    axes.plot(*zip(*front, strict=True), label="Pareto front", **style)
    if beaten:
        axes.plot(*zip(*beaten, strict=True), "s", color="0.4", markerfacecolor="white", label="beaten")
    _scale(axes)
    axes.set_xlabel(f"{label} (log scale)")
    axes.grid(color="0.88")
    path = front[:1]
    for (x, y), (after, below) in pairwise(front):
        path += [(x, below) if more_is_better else (after, y), (after, below)]
    return _Panel(axes, known, points, path)


def _scale(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.1)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _short_count(value))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis, at least four unless it spans next to nothing."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for digits in ((1,), (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        shown = [tick for tick in ticks if low <= tick <= high]
        if len(shown) > 3:
            return shown
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _short_count(value: float) -> str:
    """A number as models are named by: 80M, 1.7B."""
    for least, size, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if value >= least:
            return f"{value / size:g}{unit}"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _label(figure: Any, panels: Sequence[_Panel], names: Sequence[str]) -> None:
    """Writes names where all of them find room, otherwise the numbers of a list beside the axes."""

    def places(texts: Sequence[str]) -> list[list[Place]]:
        own = [[texts[number] for number in panel.models] for panel in panels]
        return [find_places(each.axes, each.points, some, each.path) for each, some in zip(panels, own, strict=True)]

    found = places(names)
    if any(place.hides for panel in found for place in panel):
        _list(figure, names)
        found = places([str(number) for number in range(1, len(names) + 1)])
    for panel, own in zip(panels, found, strict=True):
        draw_labels(panel.axes, own)


def _list(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 2.4, max(height, 0.17 * len(names) + 0.8))
    # A figure space is as wide as a digit.
    texts = [f"{number:\u2007>{len(str(len(names)))}}  {name}" for number, name in enumerate(names, 1)]
    nothing = [Line2D([], [], linestyle="none", label=text) for text in texts]
    figure.legend(handles=nothing, loc="outside right upper", fontsize=FONT_SIZE, handlelength=0, handletextpad=0)
