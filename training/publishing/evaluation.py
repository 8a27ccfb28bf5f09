"""Scores, losses and figures of a packed folder: of exactly the released weights, under public names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.outputs import write_whole
from training.evaluation.figures import (
    Curves,
    curves_figure,
    dimensions_figure,
    find_log,
    languages_figure,
    learning_figure,
    load_curves,
    pareto_figure,
    save,
)
from training.evaluation.records import SCORES, Evaluation, ModelRecord, Score, labels, load_evaluation
from training.evaluation.summary import summarize
from training.models.model_folder import user_error
from training.models.model_ref import find_model, model_revision
from training.publishing.record import load_release
from training.publishing.states import COMMIT, ModelState

logger = logging.getLogger("training")

# Names in a packed folder.
EVALUATION, RESULTS, FIGURES, LOSSES = "evaluation", "results.json", Path("figures"), Path("evaluation/losses.json")
# Folder of a recipe's report.
REPORT = "report"
# Entries of an evaluation that are not models.
_BASELINES = ("TF-IDF",)
_PAIRS_RESULT = ("accuracy", "tfidf", "languages", "scripts", "pairs")
_FIGURES = ("dimensions", "languages", "learning", "pareto")
_CURVES = "curves-"


def write_evaluation(
    state: ModelState, stages: Mapping[str, ModelState], name: str, output: Path, given: Path | None = None
) -> None:
    """Write ``evaluation/`` of a packed folder, if there are scores of this model.

    Args:
        state: The model.
        stages: All stages of its lineage, by name.
        name: Name of the release.
        output: The packed folder.
        given: Folder of an evaluation; if None, the first one of this model in the run or beside it.
    """
    identity = model_revision(str(state.folder), "RUN")
    # A recipe of one stage writes its report into the run, one of several beside it.
    folders = [state.run, state.run.absolute().parent] if given is None else [given]
    evaluation = _find_evaluation(folders, identity) if given is None else load_evaluation(given, missing_ok=True)
    names = {record.label: _public_name(record, identity, state, stages, name) for record in evaluation.models}
    for label in (label for label, public in names.items() if public is None):
        logger.warning("scores of %s are left out: a model of this machine, or another state of it", label)
    if name in names.values():
        _renamed(evaluation, names).save(output / EVALUATION)
    elif given is not None:
        why = "holds no scores of the model as it is now" if (given / SCORES).is_file() else f"lacks {SCORES}"
        raise UserError(f"{given}: {why}; evaluate {state.folder} and give the output as --evaluation")
    else:
        logger.warning(
            "no scores are released: neither %s nor the folder that it lies in has an evaluation of the model as it is "
            "now; evaluate %s and give the output as --evaluation",
            *(state.run, state.folder),
        )
    _write_results(
        (path for folder in folders for path in sorted(folder.glob("evaluation*.json"))), identity, name, output
    )


def _find_evaluation(folders: Iterable[Path], identity: str) -> Evaluation:
    """The first evaluation of this model; the report of the run must not be damaged."""
    reports = [folder / REPORT for folder in folders]
    others = (path.parent for folder in folders for path in sorted(folder.glob(f"*/{SCORES}")))
    for folder in dict.fromkeys([*reports, *others]):
        try:
            evaluation = load_evaluation(folder, missing_ok=True)
        except UserError as error:
            if folder in reports:
                raise
            logger.warning("%s: left out, %s", folder, error)
            continue
        if any(record.identity == identity for record in evaluation.models):
            return evaluation
    return Evaluation()


def _public_name(
    record: ModelRecord, identity: str, state: ModelState, stages: Mapping[str, ModelState], name: str
) -> str | None:
    """What a model of an evaluation is called in public; None for a model of this machine, or a changed one."""
    if record.identity == identity:
        return name
    if record.identity is None:
        return record.name if record.name in _BASELINES else None
    if COMMIT.fullmatch(record.identity):
        return record.name
    try:
        folder, _ = find_model(str(state.resolve(record.name)), record.revision)
    except UserError:
        return None
    same = (stage for stage, each in stages.items() if each.folder.resolve() == Path(folder).resolve())
    stage = next(same, None)
    return stage if stage is not None and model_revision(folder, "RUN") == record.identity else None


def _renamed(evaluation: Evaluation, names: Mapping[str, str | None]) -> Evaluation:
    """The models of an evaluation that have new ``names`` by label; without failures, whose reasons name paths."""
    result, new_labels = Evaluation(), {}
    for record in evaluation.models:
        name = names[record.label]
        if name is None:
            continue
        on_hub = record.identity is not None and COMMIT.fullmatch(record.identity)
        known = {} if on_hub else {"revision": None, "identity": None}
        # Speed says more about the machine, which is not named.
        public = replace(record, name=name, texts_per_second=None, **known)
        new_labels[record.label] = public.label
        result.add_model(public)
    moved: dict[str, Score] = {}
    for score in evaluation.scores:
        public = replace(score, model=new_labels.get(score.model, ""))
        # A model may have been evaluated under two names.
        if public.model and public.key not in moved:
            moved[public.key] = public
            if score.key in evaluation.examples:
                result.examples[public.key] = evaluation.examples[score.key]
    result.scores = list(moved.values())
    return result


def _write_results(paths: Iterable[Path], identity: str, name: str, output: Path) -> None:
    """Copy the first result on held-out pairs that is of this model."""
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("%s: left out, it cannot be read (%s)", path, type(error).__name__)
            continue
        if content.get("identity") == identity:
            public = {key: content[key] for key in _PAIRS_RESULT if key in content}
            (output / EVALUATION).mkdir(exist_ok=True)
            write_whole(output / EVALUATION / RESULTS, json.dumps({**public, "model": name}, indent=2) + "\n")
            return


def own_label(evaluation: Evaluation, name: str) -> str | None:
    """Return the label under which a release was scored, preferably without options; None if it was not."""
    scored = set(labels(evaluation))
    own = [each for each in evaluation.models if each.name == name and each.revision is None and each.label in scored]
    own.sort(key=lambda record: bool(record.options))
    return next((each.label for each in own if evaluation.select(model=each.label, precision="float32")), None)


def save_losses(runs: Mapping[str, Path], folder: Path) -> None:
    """Write the logged losses of stages, by the name of the stage, to a packed folder, as far as there are logs."""
    curves = {stage: of_stage for stage, run in runs.items() if find_log(run) and (of_stage := load_curves(run))}
    if curves:
        (folder / LOSSES).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / LOSSES, json.dumps(curves, ensure_ascii=False) + "\n")


def draw_figures(folder: Path) -> list[Path]:
    """Draw the figures of a packed folder as SVG and PNG, and delete those of an earlier state.

    ``dimensions`` (quality by width and precision), ``languages`` (by language and script), ``learning`` (by training
    step), ``pareto`` (beside other models) and ``curves-N`` (losses of the N-th stage), as far as there are numbers.
    The same folder gives the same bytes.
    """
    release = load_release(folder)
    evaluation = load_evaluation(folder / EVALUATION, missing_ok=True)
    output, label = folder / FIGURES, own_label(evaluation, release.name)
    figures = {"learning": learning_figure(evaluation)}
    if label is not None:
        models = [model for model in evaluation.models if model.label == label]
        own = Evaluation(models, evaluation.select(model=label), evaluation.examples)
        figures["dimensions"], figures["pareto"] = dimensions_figure(own), pareto_figure(evaluation)
        figures["languages"] = languages_figure(summarize(evaluation, label))
    for number, (stage, curves) in enumerate(_load_losses(folder).items()):
        figures[f"{_CURVES}{number}"] = curves_figure(curves, stage)
    drawn = [path for name, figure in figures.items() for path in save(figure, output, name)]
    for path in {*output.glob("*.svg"), *output.glob("*.png")} - {*drawn}:
        path.unlink()
    return drawn


def drawn_figures(folder: Path) -> dict[str, Any]:
    """Return the path of each figure by name, None if there is none, and stage and path of each under ``curves``."""
    stages = [(stage, _path(folder, f"{_CURVES}{number}")) for number, stage in enumerate(_load_losses(folder))]
    curves = [{"stage": stage, "path": path} for stage, path in stages if path]
    return {**{name: _path(folder, name) for name in _FIGURES}, "curves": curves}


def _path(folder: Path, name: str) -> str | None:
    path = FIGURES / f"{name}.png"
    return path.as_posix() if (folder / path).is_file() else None


def _load_losses(folder: Path) -> dict[str, Curves]:
    path = folder / LOSSES
    if not path.is_file():
        return {}
    with user_error(f"{path}: holds no losses", "pack the run again"):
        return {str(stage): dict(curves) for stage, curves in json.loads(path.read_text(encoding="utf-8")).items()}
