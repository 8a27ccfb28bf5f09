"""Loss of each source over a run's training, from the newest ``trainer_state.json``."""

from __future__ import annotations

import json
from pathlib import Path

from training.checkpoints import numbered_checkpoints
from training.errors import UserError
from training.evaluation.figures.style import LINES, new_figure, save, short_label

__all__ = ["draw_curves", "load_curves"]

_MOST_SOURCES = 24
_KINDS = {"loss_source/": "training", "eval_source/": "validation"}

Curves = dict[str, dict[str, list[tuple[int, float]]]]


def load_curves(run: Path) -> Curves:
    """By source and kind (``training``, ``validation``), the steps and losses.

    Raises:
        UserError: If the run has no readable log.
    """
    found = [
        p for folder in (run, *reversed(numbered_checkpoints(run))) if (p := folder / "trainer_state.json").is_file()
    ]
    if not found:
        raise UserError(f"{run}: no trainer_state.json in it or its checkpoints; name the output_dir of a run")
    curves: Curves = {}
    try:
        for line in json.loads(found[0].read_text(encoding="utf-8"))["log_history"]:
            for key, value in line.items():
                for prefix, kind in _KINDS.items():
                    if key.startswith(prefix):
                        of_source = curves.setdefault(key.removeprefix(prefix), {})
                        of_source.setdefault(kind, []).append((int(line["step"]), float(value)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{found[0]}: holds no log ({type(error).__name__}); train further to write another") from None
    return curves


def draw_curves(run: Path, folder: Path, name: str = "curves") -> list[Path]:
    """Writes ``name.svg`` and ``.png``, a panel a source; nothing if the log names no source."""
    curves = load_curves(run)
    shown = sorted(curves)[:_MOST_SOURCES]
    if not shown:
        return []
    rows = -(-len(shown) // 4)
    figure = new_figure(11, 2.4 * rows + 0.6)
    grid = figure.subplots(rows, 4, squeeze=False).flat
    for axes, source in zip(grid, shown, strict=False):
        for style, kind in zip(LINES, _KINDS.values(), strict=False):
            if points := curves[source].get(kind):
                axes.plot([x for x, _ in points], [y for _, y in points], label=kind, markersize=3, **style)
        axes.set_title(short_label(source), fontsize=9)
        axes.legend(fontsize=7)
    for axes in list(figure.axes)[len(shown) :]:
        axes.remove()
    figure.supxlabel("training step")
    figure.supylabel("loss (nats)")
    figure.suptitle(f"{len(shown)} of {len(curves)} sources", fontsize=10)
    return save(figure, folder, name)
