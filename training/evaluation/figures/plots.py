"""Quality against dimensions, cost and training steps, and the losses of a training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.run_folder import numbered_checkpoints
from training.evaluation.figures.style import GRID, QUIET, line_style, new_figure, save, short_labels, shortened
from training.evaluation.records import PRECISIONS, Evaluation, Score, bytes_per_vector
from training.evaluation.selection import Sweep, by_task, find_sweeps, finished_models, shared_scores, task_mean

_MOST_MODELS = 6
_PRECISION_NAMES = {"float32": "32-bit float", "int8": "8-bit integer", "binary": "1 bit"}
# Up to this many tasks have a line each; more are grouped by type.
_FEW_TASKS = 4
MEAN = "Mean over tasks"
# By attribute of a model: the axis, and whether more of it is better.
_COSTS = {"parameters": ("Parameters", False), "texts_per_second": ("Texts encoded per second", True)}
_MOST_SOURCES, _MOST_COLUMNS, _MOST_MARKERS = 60, 5, 12
# Inches, and letters of a title that fit into an inch.
_MOST_WIDTH, _LETTERS = 11.2, 12
_KINDS = {"loss_source/": "training", "eval_source/": "validation"}

Points = dict[str, list[tuple[int, float]]]
# By source and kind of loss, steps and losses.
Curves = dict[str, Points]


def draw_dimensions(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write ``dimensions.svg`` and ``.png``; nothing if no model was scored at two dimensions or precisions."""
    return save(dimensions_figure(evaluation), folder, "dimensions")


def dimension_points(evaluation: Evaluation, model: str) -> Points:
    """Return dimensions and mean scores in percent by precision, over the tasks that were scored at all of them."""
    grouped: dict[tuple[str, int], list[Score]] = {}
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


def dimensions_figure(evaluation: Evaluation) -> Any:
    """Return the figure: a row per model, a line per precision, over dimensions and over bytes."""
    found = {model: dimension_points(evaluation, model) for model in finished_models(evaluation)}
    swept = {model: points for model, points in found.items() if sum(map(len, points.values())) > 1}
    if not swept:
        return None
    figure, grid = _model_rows(len(swept), 10, 2)
    for (left, right), (model, points) in zip(grid, swept.items(), strict=False):
        sizes = {
            precision: [(bytes_per_vector(dimension, precision), value) for dimension, value in line]
            for precision, line in points.items()
        }
        for axes, lines, label in ((left, points, "Dimensions kept"), (right, sizes, "Bytes per vector")):
            _draw_precisions(axes, lines, f"{label} (log scale)")
        left.set_title(shortened(model, 60), fontsize=11, loc="left")
        left.set_ylabel("Mean score over tasks (%)")
        left.legend(title="Precision", fontsize=9)
    return figure


def _model_rows(models: int, width: float, columns: int) -> tuple[Any, Any]:
    """Return a figure with a row of axes per model, up to a maximum that is named in its title."""
    shown = min(models, _MOST_MODELS)
    figure = new_figure(width, 3.4 * shown + 0.4)
    if shown < models:
        figure.suptitle(f"{shown} of {models} models", fontsize=10)
    return figure, figure.subplots(shown, columns, squeeze=False, sharey="row")


def _draw_precisions(axes: Any, points: Points, label: str) -> None:
    for precision, line in points.items():
        number = list(PRECISIONS).index(precision)
        # Smaller markers on top, so that lines on one another can be seen.
        style = {**line_style(number), "markersize": 8 - 1.5 * number}
        axes.plot(*zip(*line, strict=True), label=_PRECISION_NAMES[precision], **style)
    # Labels of smaller values that would overlap with that of a larger one are left out.
    ticks: list[int] = []
    for value in sorted({x for line in points.values() for x, _ in line}, reverse=True):
        if not ticks or ticks[0] >= 1.5 * value:
            ticks.insert(0, value)
    turned = {"rotation": 45, "ha": "right", "fontsize": 8} if len(ticks) > 7 else {}
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], **turned)
    axes.xaxis.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(color=GRID)


def draw_learning(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write ``learning.svg`` and ``.png``; nothing if no model was scored at two steps."""
    return save(learning_figure(evaluation), folder, "learning")


@dataclass(frozen=True)
class LearningCurve:
    """Scores of a model over its training, in percent.

    Attributes:
        lines: For all tasks (:data:`MEAN`, the first) and by task or type of task, steps and mean scores.
        final: The mean score of the finished model, if it was scored.
    """

    lines: Points
    final: float | None
    tasks: list[str]


def learning_points(evaluation: Evaluation, sweep: Sweep) -> LearningCurve | None:
    """Return the float32 scores at full width, over the tasks of all steps and the finished model.

    Returns:
        The curve; None if fewer than two steps have such tasks.
    """
    models = [label for _, label in sweep.steps] + ([sweep.final] if sweep.final else [])
    scores = shared_scores(evaluation, models)
    steps = [(step, scores[label]) for step, label in sweep.steps if label in scores]
    if len(steps) < 2:
        return None
    tasks = {score.task for score in steps[0][1]}
    group = "task" if len(tasks) <= _FEW_TASKS else "task_type"
    names = sorted({getattr(score, group) for score in steps[0][1]})
    lines = {MEAN: [(step, 100 * task_mean(found)) for step, found in steps]}
    # A single group has the line of the mean.
    for name in names if len(names) > 1 else ():
        lines[name] = [(step, 100 * task_mean(evaluation.select(found, **{group: name}))) for step, found in steps]
    final = 100 * task_mean(scores[sweep.final]) if sweep.final in scores else None
    return LearningCurve(lines, final, sorted(tasks))


def learning_figure(evaluation: Evaluation) -> Any:
    """Return the figure: a row per model, a line per task or type of task."""
    found = [(sweep, curve) for sweep in find_sweeps(evaluation) if (curve := learning_points(evaluation, sweep))]
    if not found:
        return None
    figure, grid = _model_rows(len(found), 8.5, 1)
    for [axes], (sweep, curve) in zip(grid, found, strict=False):
        _draw_learning(axes, curve)
        axes.set_title(shortened(sweep.name, 60), fontsize=11, loc="left")
        unit = sweep.unit.lower()
        axes.set_xlabel("Training step" if unit in ("step", "checkpoint") else unit.capitalize())
        many = f"Mean score over {len(curve.tasks)} tasks (%)"
        axes.set_ylabel(many if len(curve.tasks) > 1 else f"Score in {shortened(curve.tasks[0], 28)} (%)")
    return figure


def _draw_learning(axes: Any, curve: LearningCurve) -> None:
    drawn = []
    for number, (name, line) in enumerate(curve.lines.items()):
        size = {"linewidth": 2.4, "markersize": 6} if name == MEAN else {"linewidth": 1.2, "markersize": 4.5}
        drawn += axes.plot(*zip(*line, strict=True), label=name, **line_style(number), **size)
    if curve.final is not None:
        axes.axhline(curve.final, color=QUIET, linewidth=0.8, linestyle=(0, (8, 3)), zorder=1)
        axes.text(1.01, curve.final, "Final", transform=axes.get_yaxis_transform(), fontsize=8, va="center")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(color=GRID)
    if len(drawn) > 1:
        # In the order in which the lines end.
        drawn.sort(key=lambda line: -line.get_ydata()[-1])
        axes.legend(handles=drawn, fontsize=8, loc="center left", bbox_to_anchor=(1.07, 0.5))


def draw_pareto(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write ``pareto.svg`` and ``.png``; nothing if fewer than two models have a size or rate and share tasks."""
    return save(pareto_figure(evaluation), folder, "pareto")


def pareto_front(points: Sequence[tuple[float, float]], more_is_better: bool = False) -> list[int]:
    """Return the positions of the points that no other dominates, by ascending x.

    Args:
        points: x and quality of each point; more quality is better.
        more_is_better: Whether more of x is better, too.
    """
    sign = -1 if more_is_better else 1
    front: list[int] = []
    best = float("-inf")
    for number in sorted(range(len(points)), key=lambda i: (sign * points[i][0], -points[i][1])):
        if points[number][1] > best or (front and points[number] == points[front[-1]]):
            front.append(number)
            best = points[number][1]
    return sorted(front, key=lambda i: points[i])


def pareto_figure(evaluation: Evaluation) -> Any:
    """Return the figure: float32 at full width over the tasks that all models share, against what a model costs.

    Models on the Pareto front, which no other model dominates, have filled markers.
    """
    scores = shared_scores(evaluation, finished_models(evaluation))
    models = [record for record in evaluation.models if record.label in scores]
    quality = {record.label: 100 * task_mean(scores[record.label]) for record in models}
    models.sort(key=lambda record: -quality[record.label])
    costs = [cost for cost in _COSTS if sum(bool(getattr(record, cost)) for record in models) > 1]
    if not costs:
        return None
    names = short_labels([record.label for record in models], most=32)
    figure = new_figure(5 * len(costs) + 2.6, max(4.8, 0.18 * len(models) + 1))
    grid = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axes, cost in zip(grid, costs, strict=True):
        label, more_is_better = _COSTS[cost]
        known = [number for number, record in enumerate(models) if getattr(record, cost)]
        points = [(float(getattr(models[number], cost)), quality[models[number].label]) for number in known]
        front = pareto_front(points, more_is_better)
        steps = "steps-pre" if more_is_better else "steps-post"
        line = axes.plot(*zip(*(points[each] for each in front), strict=True), color=QUIET, linestyle="--")
        line[0].set(drawstyle=steps, zorder=1, label="Pareto front")
        handles.setdefault("Pareto front", line[0])
        for position, number in enumerate(known):
            style = {**line_style(number), "linestyle": "none", "markersize": 7}
            style["markerfacecolor"] = style["color"] if position in front else "white"
            handles.setdefault(names[number], axes.plot(*points[position], label=names[number], **style)[0])
        _scale_costs(axes)
        axes.set_xlabel(f"{label} (log scale)")
        axes.grid(color=GRID)
    grid[0].set_ylabel("Mean score over tasks (%)")
    order = [name for name in dict.fromkeys(["Pareto front", *names]) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right upper", fontsize=8)
    return figure


def _scale_costs(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.1)
    low, high = axes.get_xlim()
    # Within one decade, matplotlib chooses automatic ticks.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _short_count(value))


def _short_count(value: float) -> str:
    """Return a number as in names of models: 80M, 1.7B."""
    for least, size, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if value >= least:
            return f"{value / size:g}{unit}"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def find_log(run: Path) -> Path | None:
    """Return the newest ``trainer_state.json`` of a run, in its folder or its last checkpoint."""
    paths = (folder / "trainer_state.json" for folder in (run, *reversed(numbered_checkpoints(run))))
    return next((path for path in paths if path.is_file()), None)


def load_curves(run: Path) -> Curves:
    """Return the logged losses of a run by source and kind (``training``, ``validation``)."""
    log = find_log(run)
    if log is None:
        raise UserError(f"{run}: no trainer_state.json in it or its checkpoints; name the output_dir of a run")
    curves: Curves = {}
    try:
        for line in json.loads(log.read_text(encoding="utf-8"))["log_history"]:
            for key, value in line.items():
                for prefix, kind in _KINDS.items():
                    if key.startswith(prefix):
                        of_source = curves.setdefault(key.removeprefix(prefix), {})
                        of_source.setdefault(kind, []).append((int(line["step"]), float(value)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{log}: holds no log ({type(error).__name__}); train further to write another") from None
    return curves


def draw_curves(run: Path, folder: Path, name: str = "curves") -> list[Path]:
    """Write ``name.svg`` and ``.png``, a panel per source; nothing if the log has no losses of sources."""
    curves = load_curves(run)
    return save(curves_figure(curves, str(run)) if curves else None, folder, name)


def curves_figure(curves: Curves, title: str = "") -> Any:
    """Return the figure of the losses of at least one source."""
    shown = sorted(sorted(curves, key=lambda source: -_last_loss(curves[source]))[:_MOST_SOURCES])
    columns = min(math.ceil(math.sqrt(len(shown))), _MOST_COLUMNS)
    rows = math.ceil(len(shown) / columns)
    width = min(_MOST_WIDTH / columns, 3.6)
    figure = new_figure(max(width * columns, 4.5), 0.7 * width * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    handles: dict[str, Any] = {}
    titles = short_labels(shown, most=int(_LETTERS * width))
    for number, axes in enumerate(grid):
        if number >= len(shown):
            axes.remove()
            continue
        for kind_number, kind in enumerate(_KINDS.values()):
            if points := curves[shown[number]].get(kind):
                # Markers on every point of a long line would hide it.
                style = {**line_style(kind_number), "markevery": math.ceil(len(points) / _MOST_MARKERS)}
                handles[kind] = axes.plot(*zip(*points, strict=True), markersize=3.5, linewidth=1.2, **style)[0]
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=GRID)
        axes.set_title(titles[number], fontsize=8)
        # Above an incomplete last row, some columns end in the row before.
        axes.tick_params(labelsize=8, labelbottom=number + columns >= len(shown))
    figure.supxlabel("Training step", fontsize=10)
    figure.supylabel("Loss (nats)", fontsize=10)
    if len(shown) < len(curves):
        title = f"{title}\n{len(shown)} of {len(curves)} sources: those whose last loss is the highest".strip()
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=10, x=0.01, ha="left")
    kinds = [kind for kind in _KINDS.values() if kind in handles]
    names = [kind.capitalize() for kind in kinds]
    figure.legend([handles[kind] for kind in kinds], names, loc="outside upper right", ncols=len(kinds), fontsize=9)
    return figure


def _last_loss(kinds: Points) -> float:
    """Return the last validation loss, or training loss if there is none; infinity if it is not a number."""
    last = kinds[next(kind for kind in reversed(_KINDS.values()) if kind in kinds)][-1][1]
    return last if math.isfinite(last) else math.inf
