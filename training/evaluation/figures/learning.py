"""Quality against the steps of a training, from a sweep over its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation.figures.style import LINES, new_figure, save, shortened
from training.evaluation.records import Evaluation, Score
from training.evaluation.selection import shared_scores, task_mean
from training.evaluation.sweeps import Sweep, find_sweeps

# So many tasks have a line each; more are drawn by their type.
_FEW_TASKS = 4
_MOST_MODELS = 6
_MORE_MARKERS = ("v", "P", "X", "*")
MEAN = "mean over tasks"


@dataclass(frozen=True)
class LearningCurve:
    """What a model scored over its training, in percent.

    Attributes:
        lines: By task, or by type of task, and for all of them (:data:`MEAN`, the first), the steps and mean scores.
        final: The mean score of the finished model; None if there is none.
        tasks: Names of the tasks.
    """

    lines: dict[str, list[tuple[int, float]]]
    final: float | None
    tasks: list[str]


def learning_points(evaluation: Evaluation, sweep: Sweep) -> LearningCurve | None:
    """The curve of a sweep: float32 at full width, over the tasks that all of its steps and the finished model have.

    Returns:
        The curve; None if there are no such tasks at two steps.
    """
    models = [label for _, label in sweep.steps] + ([sweep.final] if sweep.final else [])
    scores = shared_scores(evaluation, models)
    steps = [(step, scores[label]) for step, label in sweep.steps if label in scores]
    if len(steps) < 2:
        return None
    tasks = {score.task for score in steps[0][1]}
    lines = {MEAN: [(step, 100 * task_mean(found)) for step, found in steps]}
    group: Callable[[Score], str] = _task if len(tasks) <= _FEW_TASKS else _task_type
    names = sorted({group(score) for score in steps[0][1]})
    # A line of the only group would be that of the mean.
    for name in names if len(names) > 1 else ():
        lines[name] = [
            (step, 100 * task_mean(score for score in found if group(score) == name)) for step, found in steps
        ]
    final = 100 * task_mean(scores[sweep.final]) if sweep.final in scores else None
    return LearningCurve(lines, final, sorted(tasks))


def _task(score: Score) -> str:
    return score.task


def _task_type(score: Score) -> str:
    return score.task_type


def draw_learning(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes ``learning.svg`` and ``.png``: a row a model, a line a task or type of task.

    Returns:
        The files; none where no model was scored at two steps.

    Raises:
        UserError: If matplotlib is missing.
    """
    figure = learning_figure(evaluation)
    return [] if figure is None else save(figure, folder, "learning")


def learning_figure(evaluation: Evaluation) -> Any:
    """The figure; None where no model was scored at two steps.

    Raises:
        UserError: If matplotlib is missing.
    """
    found = [(sweep, curve) for sweep in find_sweeps(evaluation) if (curve := learning_points(evaluation, sweep))]
    shown = found[:_MOST_MODELS]
    if not shown:
        return None
    figure = new_figure(8.5, 3.4 * len(shown) + 0.4)
    for axes, (sweep, curve) in zip(figure.subplots(len(shown), 1, squeeze=False).flat, shown, strict=True):
        _draw(axes, curve)
        axes.set_title(shortened(sweep.name, 60), fontsize=11, loc="left")
        counted = sweep.unit.lower()
        axes.set_xlabel("training step" if counted in ("step", "checkpoint") else counted)
        many = f"mean score over {len(curve.tasks)} tasks (%)"
        axes.set_ylabel(many if len(curve.tasks) > 1 else f"score in {shortened(curve.tasks[0], 28)} (%)")
    if len(shown) < len(found):
        figure.suptitle(f"{len(shown)} of {len(found)} models", fontsize=10)
    return figure


def _draw(axes: Any, curve: LearningCurve) -> None:
    drawn = []
    for number, (name, line) in enumerate(curve.lines.items()):
        drawn += axes.plot(*zip(*line, strict=True), label=name, **_style(number))
    if curve.final is not None:
        axes.axhline(curve.final, color="0.3", linewidth=0.8, linestyle=(0, (8, 3)), zorder=1)
        axes.text(1.01, curve.final, "final", transform=axes.get_yaxis_transform(), fontsize=8, va="center")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(color="0.88")
    if len(drawn) > 1:
        # In the order in which the lines end.
        drawn.sort(key=lambda line: -line.get_ydata()[-1])
        axes.legend(handles=drawn, fontsize=8, loc="center left", bbox_to_anchor=(1.07, 0.5))


def _style(number: int) -> dict[str, Any]:
    """The mean is thick; the lines after the first four have hollow markers, those after eight have other ones."""
    style = dict(LINES[number % len(LINES)])
    if number == 0:
        return {**style, "linewidth": 2, "markersize": 5}
    turn = number // len(LINES)
    if turn > 1:
        style["marker"] = _MORE_MARKERS[number % len(LINES)]
    return {**style, "markerfacecolor": "white" if turn % 2 else style["color"], "linewidth": 1, "markersize": 4.5}
