"""Figures of an evaluation: dimensions, cost, training steps, languages and losses."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.common.errors import UserError
from training.common.run_folder import numbered_checkpoints
from training.evaluation.records import (
    PRECISIONS,
    Evaluation,
    Score,
    Sweep,
    bytes_per_vector,
    find_sweeps,
    finished_models,
    of_shared_tasks,
    shared_scores,
    task_mean,
)
from training.evaluation.summary import GroupScore, Summary

# Lines differ in colour, line style and marker, so also in grey. The colours are those of Okabe and Ito ("Color
# Universal Design", 2008) for colour-blind readers, without yellow; neighbours differ in lightness.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#D55E00", "#56B4E9", "#CC79A7")
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
# A figure has at most so many rows, one for each model, and panels, one for each source.
_MOST_MODELS, _MOST_SOURCES = 6, 40
# Columns of panels, and markers on a line.
_COLUMNS, _MOST_MARKERS = 5, 12
_PRECISION_NAMES = {"float32": "32-bit float", "int8": "8-bit integer", "binary": "1 bit"}
# Up to this many tasks have a line each; more are grouped by type.
_FEW_TASKS = 4
MEAN = "Mean over tasks"
_SCORE = "Mean score over tasks (%)"
_FRONT = "Pareto front"
# By attribute of a model: the axis, and whether more of it is better.
_COSTS = {"parameters": ("Parameters", False), "texts_per_second": ("Texts encoded per second", True)}
_KINDS = {"loss_source/": "training", "eval_source/": "validation"}

# Languages in a row.
_CELLS = 16
# From yellow (low) to dark blue (high): the order is the same in grey and for colour-blind readers.
_COLOUR_MAP = "cividis_r"
_FRAMED = 10

# x and y of the points of a line, and lines by name.
Line = Sequence[tuple[float, float]]
Points = dict[str, list[tuple[int, float]]]
# By source and kind of loss, steps and losses.
Curves = dict[str, Points]


def line_style(number: int) -> dict[str, Any]:
    """Return colour, line style and marker of the line with a number; the first 28 differ, neighbours in all three."""
    traits = {"color": COLOURS, "linestyle": _DASHES, "marker": _MARKERS}
    return {trait: values[number % len(values)] for trait, values in traits.items()}


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png``, or nothing without a figure; the same figure gives the same bytes."""
    if figure is None:
        return []
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.svg", folder / f"{name}.png"]
    # Text stays text, to be searched and read aloud; ids are salted by name, since figures share a page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(files[0], metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.savefig(files[1], dpi=110)
    return files


def short_labels(names: Sequence[str], most: int = 28) -> list[str]:
    """Return the last parts of names, as many as tell all of them apart, shortened."""
    parts = [name.rstrip("/").split("/") for name in names]
    labels = (["/".join(each[-count:]) for each in parts] for count in range(1, max(map(len, parts), default=0) + 1))
    found = next((each for each in labels if len(set(each)) == len(set(names))), names)
    return [shortened(label, most) for label in found]


def shortened(name: str, most: int) -> str:
    """Return a name without its middle if it is longer than ``most``, escaped for matplotlib."""
    # A dollar sign would begin a formula.
    shown = name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
    return shown.replace("$", r"\$")


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib; install it with pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def _rows_of_models(models: int, width: float, columns: int) -> tuple[Any, Any]:
    """Return a figure and its ``(rows, columns)`` axes: a row for each of the first models."""
    rows = min(models, _MOST_MODELS)
    figure = _new_figure(width, 3.4 * rows + 0.4)
    if rows < models:
        figure.suptitle(f"The first {rows} of {models} models", fontsize=11, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey="row")


def _plot(axes: Any, lines: Mapping[str, Line], styles: Sequence[int] = (), **more: Any) -> dict[str, Any]:
    """Draw lines over a grid, each with the style of its number, and return them by name."""
    axes.grid(color="0.88")
    drawn = {}
    for number, (name, line) in zip(styles or range(len(lines)), lines.items(), strict=False):
        # Markers on every point of a long line would hide it.
        style = {**line_style(number), "markevery": math.ceil(len(line) / _MOST_MARKERS), **more}
        drawn[name] = axes.plot(*zip(*line, strict=True), label=name, **style)[0]
    return drawn


def dimension_points(evaluation: Evaluation, model: str) -> Points:
    """Return dimensions and mean scores in percent by precision, over the tasks that were scored at all of them."""
    grouped: dict[tuple[str, int], list[Score]] = defaultdict(list)
    for score in sorted(evaluation.select(model=model), key=lambda each: (-PRECISIONS[each.precision], each.dimension)):
        grouped[score.precision, score.dimension].append(score)
    points: Points = defaultdict(list)
    for (precision, dimension), scores in of_shared_tasks(grouped).items():
        points[precision].append((dimension, 100 * task_mean(scores)))
    return dict(points)


def dimensions_figure(evaluation: Evaluation) -> Any:
    """Return a row per model, a line per precision, over dimensions and over bytes; None if no model has two views."""
    found = {model: dimension_points(evaluation, model) for model in finished_models(evaluation)}
    swept = {model: points for model, points in found.items() if sum(map(len, points.values())) > 1}
    if not swept:
        return None
    figure, grid = _rows_of_models(len(swept), 10, 2)
    kinds = (("Dimensions kept", lambda dimension, precision: dimension), ("Bytes per vector", bytes_per_vector))
    for (left, right), (model, points) in zip(grid, swept.items(), strict=False):
        for axes, (label, size_of) in zip((left, right), kinds, strict=True):
            lines = {
                _PRECISION_NAMES[precision]: [(size_of(dimension, precision), value) for dimension, value in line]
                for precision, line in points.items()
            }
            _plot(axes, lines, [list(PRECISIONS).index(precision) for precision in points])
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel(f"{label} (log scale)")
        left.set_title(shortened(model, 60), fontsize=11, loc="left")
        left.set_ylabel(_SCORE)
        left.legend(title="Precision", fontsize=9)
    return figure


def learning_points(evaluation: Evaluation, sweep: Sweep) -> tuple[Points, float | None]:
    """Return the float32 scores at full width, in percent, over the tasks of all steps and the finished model.

    They are means by step for all tasks (:data:`MEAN`, the first) and by task or type of task, without lines if fewer
    than two steps have such tasks; and the mean score of the finished model, if it was scored.
    """
    models = [label for _, label in sweep.steps] + ([sweep.final] if sweep.final else [])
    scores = shared_scores(evaluation, models)
    steps = [(step, scores[label]) for step, label in sweep.steps if label in scores]
    if len(steps) < 2:
        return {}, None
    group = "task" if len({score.task for score in steps[0][1]}) <= _FEW_TASKS else "task_type"
    names = sorted({getattr(score, group) for score in steps[0][1]})
    lines = {MEAN: [(step, 100 * task_mean(found)) for step, found in steps]}
    # A single group has the line of the mean.
    for name in names if len(names) > 1 else ():
        lines[name] = [(step, 100 * task_mean(evaluation.select(found, **{group: name}))) for step, found in steps]
    return lines, 100 * task_mean(scores[sweep.final]) if sweep.final in scores else None


def learning_figure(evaluation: Evaluation) -> Any:
    """Return a row per model, a line per task or type of task, over training steps; None if no model has two."""
    found = [(sweep, *learning_points(evaluation, sweep)) for sweep in find_sweeps(evaluation)]
    found = [(sweep, lines, final) for sweep, lines, final in found if lines]
    if not found:
        return None
    figure, grid = _rows_of_models(len(found), 8.5, 1)
    for axes, (sweep, lines, final) in zip(grid.flat, found, strict=False):
        _plot(axes, lines)[MEAN].set_linewidth(2.4)
        if final is not None:
            axes.axhline(final, color="0.35", linewidth=0.8, linestyle=(0, (8, 3)), label="Finished model")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(shortened(sweep.name, 60), fontsize=11, loc="left")
        axes.set_xlabel(sweep.unit.capitalize())
        axes.set_ylabel(_SCORE)
    return figure


def pareto_front(points: Sequence[tuple[float, float]], more_is_better: bool = False) -> list[int]:
    """Return the positions of the points (x, quality) that no other dominates, by ascending x.

    More quality is better; ``more_is_better`` says whether more of x is, too.
    """
    x, quality = np.array(points).T * [[1 if more_is_better else -1], [1]]
    as_good = (x[:, None] >= x) & (quality[:, None] >= quality)
    dominated = (as_good & ~as_good.T).any(axis=0)
    return sorted(np.flatnonzero(~dominated).tolist(), key=lambda number: points[number])


def pareto_figure(evaluation: Evaluation) -> Any:
    """Return float32 quality at full width, over the tasks that all models share, against what a model costs.

    Models on the Pareto front, which no other model dominates, have filled markers. None if fewer than two models have
    a size or rate and share tasks.
    """
    scores = shared_scores(evaluation, finished_models(evaluation))
    quality = {label: 100 * task_mean(found) for label, found in scores.items()}
    models = sorted((each for each in evaluation.models if each.label in quality), key=lambda m: -quality[m.label])
    costs = [cost for cost in _COSTS if sum(bool(getattr(record, cost)) for record in models) > 1]
    if not costs:
        return None
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    names = short_labels([record.label for record in models], most=32)
    figure = _new_figure(5 * len(costs) + 2.6, max(4.8, 0.18 * len(models) + 1))
    handles: dict[str, Any] = dict.fromkeys([_FRONT, *names])
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False, sharey=True)[0], costs, strict=True):
        label, more_is_better = _COSTS[cost]
        known = [number for number, record in enumerate(models) if getattr(record, cost)]
        points = [(float(getattr(models[number], cost)), quality[models[number].label]) for number in known]
        front = pareto_front(points, more_is_better)
        steps = "steps-pre" if more_is_better else "steps-post"
        line = {_FRONT: [points[each] for each in front]}
        handles |= _plot(axes, line, color="0.35", linestyle="--", marker="", drawstyle=steps, zorder=1)
        lines = {names[number]: [point] for number, point in zip(known, points, strict=True)}
        drawn = _plot(axes, lines, known, linestyle="none", markersize=7)
        handles |= drawn
        for position, marker in enumerate(drawn.values()):
            if position not in front:
                marker.set_markerfacecolor("white")
        axes.set_xscale("log")
        axes.margins(x=0.1, y=0.1)
        low, high = axes.get_xlim()
        # Within one decade, matplotlib chooses automatic ticks.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        # Billions as in names of models: 1.7B.
        axes.xaxis.get_major_formatter().ENG_PREFIXES = {**EngFormatter.ENG_PREFIXES, 9: "B"}
        axes.set_xlabel(f"{label} (log scale)")
    figure.axes[0].set_ylabel(_SCORE)
    legend = {name: handle for name, handle in handles.items() if handle}
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=8)
    return figure


def find_log(run: Path) -> Path | None:
    """Return the newest ``trainer_state.json`` of a run, in its folder or its last checkpoint."""
    paths = (folder / "trainer_state.json" for folder in (run, *reversed(numbered_checkpoints(run))))
    return next((path for path in paths if path.is_file()), None)


def load_curves(run: Path) -> Curves:
    """Return the logged losses of a run by source and kind (``training``, ``validation``)."""
    log = find_log(run)
    if log is None:
        raise UserError(f"{run}: no trainer_state.json in it or its checkpoints; name the output_dir of a run")
    curves: Curves = defaultdict(lambda: defaultdict(list))
    try:
        for line in json.loads(log.read_text(encoding="utf-8"))["log_history"]:
            for key, value in line.items():
                for prefix, kind in _KINDS.items():
                    if key.startswith(prefix):
                        curves[key.removeprefix(prefix)][kind].append((int(line["step"]), float(value)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{log}: holds no log ({type(error).__name__}); train further to write another") from None
    return {source: dict(kinds) for source, kinds in curves.items()}


def curves_figure(curves: Curves, title: str = "") -> Any:
    """Return a panel with the losses of each source, of those with the most losses; None without sources."""
    if not curves:
        return None
    # A source of more rows is in more of the logged steps.
    names = sorted(sorted(curves, key=lambda name: -sum(map(len, curves[name].values())))[:_MOST_SOURCES])
    if len(names) < len(curves):
        title = f"{title}\nThe {len(names)} of {len(curves)} sources with the most logged losses".lstrip()
    columns = min(len(names), _COLUMNS)
    rows = math.ceil(len(names) / columns)
    figure = _new_figure(max(2.2 * columns, 4.5), 1.6 * rows + 1.2)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    handles: dict[str, Any] = {}
    for number, (axes, source, name) in enumerate(zip(grid, names, short_labels(names, 26), strict=False)):
        styles = {kind: style for style, kind in enumerate(_KINDS.values()) if kind in curves[source]}
        lines = {kind.capitalize(): curves[source][kind] for kind in styles}
        handles |= _plot(axes, lines, list(styles.values()), markersize=3.5, linewidth=1.2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(name, fontsize=8)
        # Above an incomplete last row, some columns end in the row before.
        axes.tick_params(labelsize=8, labelbottom=number + columns >= len(names))
    for axes in figure.axes[len(names) :]:
        axes.remove()
    figure.supxlabel("Training step", fontsize=10)
    figure.supylabel("Loss (nats)", fontsize=10)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10, x=0.01, ha="left")
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2, fontsize=9)
    return figure


def lay_out(languages: Sequence[GroupScore]) -> list[str | GroupScore]:
    """Return the cells of the grid in reading order: each script's name, then its languages, the lowest score first.

    Scripts with more languages come first.
    """
    scripts: dict[str, list[str | GroupScore]] = {}
    for group in sorted(languages, key=lambda group: group.macro):
        script = group.name.partition("-")[2] or "other"
        scripts.setdefault(script, [script]).append(group)
    order = sorted(scripts, key=lambda script: (-len(scripts[script]), script))
    return [cell for script in order for cell in scripts[script]]


def languages_figure(summary: Summary) -> Any:
    """Return a cell per language with its score, the lowest ten framed; None without languages."""
    if not summary.languages:
        return None
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    cells = lay_out(summary.languages)
    rows = -(-len(cells) // _CELLS)
    figure = _new_figure(10, 0.42 * rows + 1.2)
    axes = figure.subplots()
    limits = Normalize(100 * summary.languages[0].macro, 100 * summary.languages[-1].macro)
    colours = ScalarMappable(limits, colormaps[_COLOUR_MAP])
    worst = summary.languages[:_FRAMED] if len(summary.languages) > _FRAMED else []
    centred = {"ha": "center", "va": "center"}
    for number, cell in enumerate(cells):
        row, column = divmod(number, _CELLS)
        if isinstance(cell, str):
            axes.text(column + 0.5, row + 0.5, cell, fontsize=9, fontweight="bold", **centred)
            continue
        colour = colours.to_rgba(100 * cell.macro)
        edge = {"edgecolor": "black", "linewidth": 2.2, "zorder": 3} if cell in worst else {"edgecolor": "white"}
        axes.add_patch(Rectangle((column + 0.05, row + 0.05), 0.9, 0.9, facecolor=colour, **edge))
        # Relative luminance as in ITU-R BT.709.
        ink = "white" if 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] < 0.45 else "black"
        for text, down in ((cell.name.partition("-")[0], 0.32), (f"{100 * cell.macro:.1f}", 0.7)):
            axes.text(column + 0.5, row + down, text, fontsize=8, color=ink, zorder=4, **centred)
    axes.set(xlim=(0, _CELLS), ylim=(rows, 0))
    axes.set_axis_off()
    framed = f"; the {len(worst)} lowest framed" if worst else ""
    title = f"{shortened(summary.model, 56)}\nScore (%) of {len(summary.languages)} languages by script{framed}"
    axes.set_title(title, fontsize=10, loc="left")
    figure.colorbar(colours, ax=axes, location="bottom", shrink=0.4, aspect=40, anchor=(0, 1), label=_SCORE)
    return figure
