"""The figures of a packed model, from its evaluation and its stages' losses; the same folder gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.run_folder import write_whole
from training.evaluation.figures.curves import Curves, curves_figure, find_log, load_curves
from training.evaluation.figures.dimensions import draw_dimensions
from training.evaluation.figures.languages import draw_languages
from training.evaluation.figures.learning import draw_learning
from training.evaluation.figures.pareto import draw_pareto
from training.evaluation.figures.style import save
from training.evaluation.records import Evaluation, load_evaluation
from training.evaluation.summary import summarize
from training.publishing.facts.results import own_label
from training.publishing.record import load_release

# Where they go, and where the losses of the stages are kept, in a packed folder.
FIGURES, LOSSES = Path("figures"), Path("evaluation/losses.json")
_CURVES = "curves-"


def save_losses(runs: Mapping[str, Path], folder: Path) -> None:
    """Keeps the logged losses of stages in a packed folder; nothing where no run has a log of them.

    Args:
        runs: Folders of runs by the names of their stages.
        folder: The packed folder.

    Raises:
        UserError: If a log cannot be read.
    """
    found = {stage: load_curves(run) for stage, run in runs.items() if find_log(run)}
    curves = {stage: of_stage for stage, of_stage in found.items() if of_stage}
    if curves:
        (folder / LOSSES).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / LOSSES, json.dumps(curves, ensure_ascii=False) + "\n")


def draw_figures(folder: Path) -> list[Path]:
    """Writes the figures of a packed folder, each as SVG and PNG, and takes away those of an earlier state.

    ``dimensions`` (quality by width and precision), ``languages`` (by language and script), ``learning`` (by training
    step), ``pareto`` (beside other models) and ``curves-N`` (losses of the N-th stage), as far as there are numbers.

    Args:
        folder: It holds ``release.json`` and, for all but an empty result, ``evaluation/``.

    Returns:
        The files.

    Raises:
        UserError: If the folder has no whole record or evaluation, or matplotlib is missing.
    """
    release = load_release(folder)
    evaluation = load_evaluation(folder / "evaluation", missing_ok=True)
    output = folder / FIGURES
    drawn: list[Path] = []
    label = own_label(evaluation, release.name)
    if label is not None:
        drawn += draw_dimensions(_of_model(evaluation, label), output)
        drawn += draw_languages(summarize(evaluation, label), output)
        drawn += draw_pareto(evaluation, output)
    drawn += draw_learning(evaluation, output)
    for number, (stage, curves) in enumerate(_losses(folder).items()):
        drawn += save(curves_figure(curves, stage), output, f"{_CURVES}{number}")
    for path in set(output.glob("*.svg")) | set(output.glob("*.png")):
        if path not in drawn:
            path.unlink()
    return drawn


def drawn_figures(folder: Path) -> dict[str, Any]:
    """What a card shows of the figures that are there.

    Returns:
        By name, the path in the folder or None; under ``curves`` stage and path of each figure of losses.
    """
    names = ("dimensions", "languages", "learning", "pareto")
    stages = [(stage, _path(folder, f"{_CURVES}{number}")) for number, stage in enumerate(_losses(folder))]
    return {name: _path(folder, name) for name in names} | {
        "curves": [{"stage": stage, "path": path} for stage, path in stages if path]
    }


def _path(folder: Path, name: str) -> str | None:
    path = FIGURES / f"{name}.png"
    return path.as_posix() if (folder / path).is_file() else None


def _losses(folder: Path) -> dict[str, Curves]:
    path = folder / LOSSES
    if not path.is_file():
        return {}
    try:
        return {str(stage): dict(curves) for stage, curves in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: holds no losses ({type(error).__name__}); pack the run again") from None


def _of_model(evaluation: Evaluation, label: str) -> Evaluation:
    models = [model for model in evaluation.models if model.label == label]
    return Evaluation(models, evaluation.select(model=label), evaluation.examples)
