"""Scores, losses and figures of a packed folder: of exactly the released weights, under public names."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
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
from training.evaluation.records import SCORES, Evaluation, ModelRecord, labels, load_evaluation
from training.evaluation.summary import summarize
from training.models.model_folder import read_json as read_settings
from training.models.model_ref import find_model, model_revision
from training.publishing.record import load_release
from training.publishing.states import COMMIT, ModelState

logger = logging.getLogger("training")

# Names in a packed folder.
EVALUATION, RESULTS, FIGURES, LOSSES = "evaluation", "results.json", Path("figures"), Path("evaluation/losses.json")
# Entries of an evaluation that are not models.
_BASELINES = ("TF-IDF",)
_PAIRS_RESULT = ("accuracy", "tfidf", "languages", "scripts", "pairs")


def write_evaluation(
    state: ModelState, stages: Mapping[str, ModelState], name: str, output: Path, given: Path | None = None
) -> None:
    """Write ``evaluation/`` of a packed folder, if there are scores of this model, called ``name``.

    ``stages`` are all of its lineage by name. They are read from ``given``, the folder of an evaluation, or else from
    the first evaluation of this model in the run or beside it.
    """
    identity = model_revision(str(state.folder), "RUN")
    # A recipe of one stage writes its report into the run, one of several beside it.
    folders = [given] if given else [state.run, state.run.absolute().parent]
    others = [path.parent for folder in folders for path in sorted(folder.glob(f"*/{SCORES}"))]
    places = [given] if given else [*(folder / "report" for folder in folders), *others]
    evaluation = None
    for place in places:
        try:
            found = load_evaluation(place, missing_ok=True)
        except UserError as error:
            if given:
                raise
            logger.warning("%s", error)
            continue
        if any(record.identity == identity for record in found.models):
            evaluation = found
            break
    how = f"evaluate {state.folder} and give the output as --evaluation"
    if evaluation is not None:
        _public(evaluation, identity, state, stages, name).save(output / EVALUATION)
    elif given is not None:
        raise UserError(f"{given}: has no {SCORES} of the model as it is now; {how}")
    else:
        logger.warning("no scores are released: there are none of the model as it is now; %s", how)
    for path in (path for folder in folders for path in sorted(folder.glob("evaluation*.json"))):
        pairs = read_settings(path)
        if pairs.get("identity") == identity:
            public = {key: pairs[key] for key in _PAIRS_RESULT if key in pairs}
            (output / EVALUATION).mkdir(exist_ok=True)
            write_whole(output / EVALUATION / RESULTS, json.dumps({**public, "model": name}, indent=2) + "\n")
            break


def _public(
    evaluation: Evaluation, identity: str, state: ModelState, stages: Mapping[str, ModelState], name: str
) -> Evaluation:
    """The models with public names and their scores; without failures, whose reasons name paths."""
    result, labels_of, more = Evaluation(), {}, _more_than_factors(state.folder)
    for record in evaluation.models:
        public_name = name if record.identity == identity else _public_name(record, state, stages)
        if public_name is None:
            logger.warning("scores of %s are left out: a model of this machine, or another state of it", record.label)
            continue
        known = {} if COMMIT.fullmatch(record.identity or "") else {"revision": None, "identity": None}
        # Speed says more about the machine, which is not named.
        public = replace(record, name=public_name, texts_per_second=None, **known)
        if record.identity == identity and record.parameters and "rank" not in record.options:
            public = replace(public, parameters=record.parameters + more)
        labels_of[record.label] = public.label
        result.add_model(public)
    keys = set()
    for score in evaluation.scores:
        public = replace(score, model=labels_of.get(score.model, ""))
        # A model may have been evaluated under two names.
        if public.model and public.key not in keys:
            keys.add(public.key)
            result.scores.append(public)
            if score.key in evaluation.examples:
                result.examples[public.key] = evaluation.examples[score.key]
    return result


def _more_than_factors(folder: Path) -> int:
    """Return how many parameters token embeddings, which are packed, have more than factors, which are evaluated."""
    config = read_settings(folder / "config.json")
    if not (ranks := config.get("embedding_ranks")):
        return 0
    vocabulary, width = config["vocab_size"], config["hidden_size"]
    return vocabulary * width - max(ranks) * (vocabulary + width)


def _public_name(record: ModelRecord, state: ModelState, stages: Mapping[str, ModelState]) -> str | None:
    """What another model of an evaluation is called in public; None for one of this machine, or a changed one."""
    if record.identity is None:
        return record.name if record.name in _BASELINES else None
    if COMMIT.fullmatch(record.identity):
        return record.name
    try:
        folder = Path(find_model(str(state.resolve(record.name)), record.revision)[0]).resolve()
    except UserError:
        return None
    stage = next((stage for stage, each in stages.items() if each.folder.resolve() == folder), None)
    return stage if stage is not None and model_revision(str(folder), "RUN") == record.identity else None


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


def _load_losses(folder: Path) -> dict[str, Curves]:
    return json.loads((folder / LOSSES).read_text(encoding="utf-8")) if (folder / LOSSES).is_file() else {}


def draw_figures(folder: Path) -> list[Path]:
    """Draw the figures of a packed folder as SVG and PNG, as far as there are numbers; always the same bytes."""
    evaluation = load_evaluation(folder / EVALUATION, missing_ok=True)
    label = own_label(evaluation, load_release(folder).name)
    figures = {"learning": learning_figure(evaluation)}
    if label is not None:
        models = [model for model in evaluation.models if model.label == label]
        own = Evaluation(models, evaluation.select(model=label), evaluation.examples)
        figures |= {"dimensions": dimensions_figure(own), "pareto": pareto_figure(evaluation)}
        figures["languages"] = languages_figure(summarize(evaluation, label))
    for number, (stage, curves) in enumerate(_load_losses(folder).items()):
        figures[f"curves-{number}"] = curves_figure(curves, stage)
    return [path for name, figure in figures.items() for path in save(figure, folder / FIGURES, name)]


def drawn_figures(folder: Path) -> dict[str, Any]:
    """Return the path of each figure by name, None if there is none, and stage and path of each under ``curves``."""
    drawn = {path.stem: path.relative_to(folder).as_posix() for path in (folder / FIGURES).glob("*.png")}
    stages = [(stage, drawn.get(f"curves-{number}")) for number, stage in enumerate(_load_losses(folder))]
    curves = [{"stage": stage, "path": path} for stage, path in stages if path]
    return {**{name: drawn.get(name) for name in ("dimensions", "languages", "learning", "pareto")}, "curves": curves}
