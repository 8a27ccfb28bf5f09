"""The evaluation of a released model: a run's scores under public names, of the very weights that are released."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from training.common.errors import UserError
from training.common.run_folder import write_whole
from training.evaluation.records import SCORES, Evaluation, ModelRecord, load_evaluation
from training.models.model_identity import model_revision
from training.models.reference import find_model
from training.publishing.states import COMMIT, ModelState

logger = logging.getLogger("training")

# Names in a packed folder.
EVALUATION, RESULTS = "evaluation", "results.json"
# Name of the folder that a recipe's report is written to.
REPORT = "report"
# What is compared with that is no model.
_BASELINES = ("TF-IDF",)
_PAIRS_RESULT = ("accuracy", "tfidf", "languages", "scripts", "pairs")


def write_evaluation(
    state: ModelState, stages: Mapping[str, ModelState], name: str, output: Path, given: Path | None = None
) -> None:
    """Writes ``evaluation/`` of a packed folder, as far as there are scores of this model.

    Args:
        state: The model.
        stages: The other stages of its lineage, by name.
        name: Of the release.
        output: The packed folder.
        given: Folder of an evaluation; if None, the first in the run or beside it that is of this model.

    Raises:
        UserError: If a folder was given that holds no evaluation of this model, or one that is damaged.
    """
    identity = model_revision(str(state.folder), "RUN")
    place = given or _report_of(state, identity)
    evaluation = Evaluation() if place is None else load_evaluation(place, missing_ok=True)
    names = _names(evaluation.models, identity, state, stages, name)
    if name in names.values():
        renamed(evaluation, names).save(output / EVALUATION)
    elif given is not None:
        why = "holds no scores of the model as it is now" if (given / SCORES).is_file() else f"lacks {SCORES}"
        raise UserError(f"{given}: {why}; evaluate {state.folder} and give the output as --evaluation")
    else:
        # A release without scores is one, too, unless they were asked for.
        logger.warning(
            "no scores are released: neither %s nor the folder that it lies in has an evaluation of the model as it is "
            "now; evaluate %s and give the output as --evaluation",
            *(state.run, state.folder),
        )
    results = (path for folder in _places(state, given) for path in sorted(folder.glob("evaluation*.json")))
    _write_results(results, identity, name, output)


def _places(state: ModelState, given: Path | None = None) -> list[Path]:
    """Where evaluations lie: a recipe of one stage writes them into the run, one of several beside it."""
    return [state.run, state.run.absolute().parent] if given is None else [given]


def _report_of(state: ModelState, identity: str) -> Path | None:
    """The folder of an evaluation of this very model, in its run or beside it; None if there is none.

    Raises:
        UserError: If the report of the run is damaged.
    """
    reports = [place / REPORT for place in _places(state)]
    others = (path.parent for place in _places(state) for path in sorted(place.glob(f"*/{SCORES}")))
    for place in dict.fromkeys([*reports, *others]):
        try:
            evaluation = load_evaluation(place, missing_ok=True)
        except UserError as error:
            if place in reports:
                raise
            logger.warning("%s: left out, %s", place, error)
            continue
        if any(record.identity == identity for record in evaluation.models):
            return place
    return None


def _names(
    models: Iterable[ModelRecord], identity: str, state: ModelState, stages: Mapping[str, ModelState], name: str
) -> dict[str, str]:
    """By label, the public name of each model that has one."""
    names = {}
    of_stages = {each.folder.resolve(): stage for stage, each in stages.items() if each is not state}
    for record in models:
        if record.identity == identity:
            names[record.label] = name
        elif record.identity is None:
            if record.name in _BASELINES:
                names[record.label] = record.name
        elif COMMIT.fullmatch(record.identity):
            names[record.label] = record.name
        elif (stage := _stage_of(record, state, of_stages)) is not None:
            names[record.label] = stage
        if record.label not in names:
            logger.warning("scores of %s are left out: a model of this machine, or another state of it", record.label)
    return names


def _stage_of(record: ModelRecord, state: ModelState, of_stages: Mapping[Path, str]) -> str | None:
    """The stage of the lineage that a record belongs to, if its model is still what was evaluated."""
    try:
        place, _ = find_model(str(state.place(record.name)), record.revision)
    except UserError:
        return None
    stage = of_stages.get(Path(place).resolve())
    if stage is None or model_revision(place, "RUN") != record.identity:
        return None
    return stage


def renamed(evaluation: Evaluation, names: Mapping[str, str]) -> Evaluation:
    """An evaluation of some of its models, under other names; without failures, whose reasons name places.

    Args:
        evaluation: The evaluation.
        names: New names by label. Revisions stay with models of the Hub; options stay.
    """
    result, labels = Evaluation(), {}
    for record in evaluation.models:
        if record.label not in names:
            continue
        commit = record.identity is not None and COMMIT.fullmatch(record.identity)
        known = {"revision": record.revision, "identity": record.identity} if commit else {}
        public = {"revision": None, "identity": None, **known}
        # How fast it was says more about a machine, which is not named.
        named = replace(record, name=names[record.label], texts_per_second=None, **public)
        labels[record.label] = named.label
        result.add_model(named)
    taken: set[str] = set()
    for score in evaluation.scores:
        moved = replace(score, model=labels.get(score.model, ""))
        # One model may have been evaluated under two names.
        if not moved.model or moved.key in taken:
            continue
        taken.add(moved.key)
        result.scores.append(moved)
        if score.key in evaluation.examples:
            result.examples[moved.key] = evaluation.examples[score.key]
    return result


def _write_results(found: Iterable[Path], identity: str, name: str, output: Path) -> None:
    """Copies the pairs that the finished model was evaluated on, if that was this very model."""
    for path in found:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.warning("%s: left out, it cannot be read (%s)", path, type(error).__name__)
            continue
        if content.get("identity") == identity:
            told = {key: content[key] for key in _PAIRS_RESULT if key in content}
            (output / EVALUATION).mkdir(exist_ok=True)
            write_whole(output / EVALUATION / RESULTS, json.dumps({**told, "model": name}, indent=2) + "\n")
            return
