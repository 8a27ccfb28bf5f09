"""Loss of each source over a run's training, from the newest ``trainer_state.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.run_folder import numbered_checkpoints
from training.evaluation.figures.style import LINES, new_figure, save, short_labels

_MOST_SOURCES, _MOST_COLUMNS, _MOST_MARKERS = 60, 5, 12
# Inches, and letters of a title that fit in an inch.
_MOST_WIDTH, _LETTERS = 11.2, 12
_KINDS = {"loss_source/": "training", "eval_source/": "validation"}

Curves = dict[str, dict[str, list[tuple[int, float]]]]


def find_log(run: Path) -> Path | None:
    """The newest log of a run: in its folder or its last checkpoint; None if there is none."""
    places = (folder / "trainer_state.json" for folder in (run, *reversed(numbered_checkpoints(run))))
    return next((path for path in places if path.is_file()), None)


def load_curves(run: Path) -> Curves:
    """By source and kind (``training``, ``validation``), the steps and losses.

    Raises:
        UserError: If the run has no readable log.
    """
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
    """Writes ``name.svg`` and ``.png``, a panel a source; nothing if the log names no source.

    Raises:
        UserError: If the run has no readable log, or matplotlib is missing.
    """
    curves = load_curves(run)
    return save(curves_figure(curves, str(run)), folder, name) if curves else []


def curves_figure(curves: Curves, title: str = "") -> Any:
    """The figure of at least one source.

    Args:
        curves: What is drawn.
        title: Which run it is of.

    Raises:
        UserError: If matplotlib is missing.
    """
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
        handles |= _draw(axes, curves[shown[number]])
        axes.set_title(titles[number], fontsize=8)
        # The last row may not be full; then the one above it ends some of the columns.
        axes.tick_params(labelsize=8, labelbottom=number + columns >= len(shown))
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("loss (nats)", fontsize=10)
    if len(shown) < len(curves):
        title = f"{title}\n{len(shown)} of {len(curves)} sources: those whose last loss is the highest".strip()
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=10, x=0.01, ha="left")
    kinds = [kind for kind in _KINDS.values() if kind in handles]
    figure.legend([handles[kind] for kind in kinds], kinds, loc="outside upper right", ncols=len(kinds), fontsize=9)
    return figure


def _last_loss(kinds: dict[str, list[tuple[int, float]]]) -> float:
    """The loss of the last validation, or training where there is none; one that is no number comes before all."""
    last = kinds[next(kind for kind in reversed(_KINDS.values()) if kind in kinds)][-1][1]
    return last if math.isfinite(last) else math.inf


def _draw(axes: Any, kinds: dict[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Draws the lines of a source and returns them by kind."""
    lines = {}
    for style, kind in zip(LINES, _KINDS.values(), strict=False):
        if points := kinds.get(kind):
            # Markers on every point of a long line would hide it.
            every = math.ceil(len(points) / _MOST_MARKERS)
            values = [x for x, _ in points], [y for _, y in points]
            lines[kind] = axes.plot(*values, markersize=3, linewidth=1, markevery=every, **style)[0]
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="0.9")
    return lines
