"""How a model came about: from its run back to what it started from and learnt from, as far as that is at hand."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.common.run_folder import DATA, FINAL_MODEL, public_name, step_of
from training.config.arguments import StageArguments
from training.config.lora_arguments import LoraArguments
from training.data.text_format import TextFormat
from training.distillation.text_teacher import text_teacher_identity
from training.models.adapter_folder import MERGED_ADAPTER
from training.models.model_identity import model_revision
from training.publishing.adapter_model import ADAPTER_CONFIG, adapter_parameters
from training.publishing.cleaning import clean_arguments
from training.publishing.folder_model import base_named
from training.publishing.hub.progress import progress_of
from training.publishing.merged import MergedParent, merge_arguments, merged_parents, newest_of_runs
from training.publishing.model_files import read_model_files
from training.publishing.record import Reference, StageRecord
from training.publishing.states import COMMIT, ModelState, read_json, state_of
from training.publishing.training_data import TEACHER_DATA, sources_of
from training.publishing.weights import read_weights
from training.stages.continuation import read_changes

logger = logging.getLogger("training")

ARGUMENTS = "training_arguments.json"
# What of a stage says how it cuts, and on what texts; the rest of the keys are about training.
_CUT = ("prune_to", "prune_hidden", "prune_layers", "calibration_texts", "trim_vocabulary")
_TEXTS = (
    *("manifest_stage", "builder", "builder_options", "sources", "task_types", "cap", "source_caps"),
    *("validation_share", "on_bad_row", "max_length", "instructions", "document_instruction_share", "seed"),
)
# Without effect in a stage that lacks the key they belong to.
_DEPENDENT = {
    "teacher": ("distillation_weight", "teacher_projection", "teacher_query_template", "teacher_document_template"),
    "lora": tuple(each.name for each in fields(LoraArguments)),
    "evaluation_sample": ("evaluation_sample", "evaluation_sample_candidates"),
    "early_stopping_patience": ("early_stopping_patience", "early_stopping_threshold"),
}


class Lineage:
    """The stages behind a model.

    Args:
        state: The model.

    Attributes:
        states: By the stage's name, what the stage made; the oldest first, the model itself last. A stage stands behind
            what it started from and what it learnt from.
    """

    def __init__(self, state: ModelState) -> None:
        self.states: dict[str, ModelState] = {}
        self._references: dict[Path, Reference] = {}
        self._parents: dict[Path, list[MergedParent]] = {}
        self._visit(state, ())

    def records(self) -> tuple[StageRecord, ...]:
        """The stages, as a release tells them."""
        return tuple(self._record(name, state) for name, state in self.states.items())

    def origins(self) -> tuple[Reference, Reference | None]:
        """What the model itself started from, and what it learnt from; None without a teacher."""
        *_, state = self.states.values()
        return self._reference(state, "model"), self._teacher(state)

    def outside(self) -> list[tuple[str, str]]:
        """What the stages started or learnt from, or were merged of, and is no stage: its public name and its place."""
        found = []
        for state in self.states.values():
            if state.merges:
                parents = [parent for parent in self._parents[state.folder.resolve()] if parent.state is None]
                found += [(parent.reference.name, parent.place) for parent in parents]
            for key in ("model", "teacher"):
                written = state.keys.get(key)
                if written is not None and self._state(state, key) is None:
                    found.append((self._reference(state, key).name, str(state.place(str(written)))))
        return list(dict.fromkeys(found))

    def _teacher(self, state: ModelState) -> Reference | None:
        return None if state.keys.get("teacher") is None else self._reference(state, "teacher")

    def _visit(self, state: ModelState, above: tuple[Path, ...]) -> Reference:
        """Takes a stage in behind those before it; ``above`` are the folders that led to it."""
        folder = state.folder.resolve()
        if folder in above:
            raise UserError(
                f"{state.run}: its model comes from itself; correct 'model' or 'teacher' in its recipe.yaml"
            )
        if folder not in self._references:
            if state.merges:
                self._visit_merged(state, (*above, folder))
            else:
                for before in filter(None, (self._state(state, key) for key in ("teacher", "model"))):
                    self._visit(before, (*above, folder))
            name = _unused(state.name, self.states)
            self.states[name] = state
            self._references[folder] = Reference("stage", name)
        return self._references[folder]

    def _visit_merged(self, state: ModelState, above: tuple[Path, ...]) -> None:
        """Takes in what a model was merged from; several states of one run are one stage."""
        parents = merged_parents(state)
        at_hand = [parent.state for parent in parents if parent.state is not None]
        of_runs = {run: self._visit(newest, above) for run, newest in newest_of_runs(at_hand).items()}
        for before in at_hand:
            self._references.setdefault(before.folder.resolve(), of_runs[before.run.resolve()])
        self._parents[state.folder.resolve()] = parents

    @staticmethod
    def _state(state: ModelState, key: str) -> ModelState | None:
        """The model behind a key, if a run made it, and it is at hand as it was then."""
        written = state.keys.get(key)
        before = state_of(state.place(str(written))) if written is not None else None
        return before if before is None or key != "teacher" or _taught(before, state) else None

    def _reference(self, state: ModelState, key: str) -> Reference:
        """What a stage started from, or learnt from."""
        if state.is_unknown:
            base = base_named(state.folder)
            return Reference("hub", base) if base else Reference("unknown")
        written = state.keys.get(key)
        if written is None:
            return Reference("scratch")
        before = self._state(state, key)
        if before is not None:
            return self._references[before.folder.resolve()]
        if state.is_hub_name(str(written)):
            return Reference("hub", str(written), _commit(state) if key == "teacher" else None)
        place = Path(str(written))
        if state.place(str(written)).exists():
            logger.warning(
                "%s: %s %s was made by no run, or changed since; its stages are not told", state.name, key, place
            )
        # `runs/big/model` says more as `big`.
        named = place.parent if place.name == "model" else place
        return Reference("local", public_name(str(named)))

    def _merging(self, name: str, state: ModelState) -> StageRecord:
        references = (
            self._references[parent.state.folder.resolve()] if parent.state else parent.reference
            for parent in self._parents[state.folder.resolve()]
        )
        parents = tuple(dict.fromkeys(references))
        return StageRecord(
            name=name,
            kind="merging",
            start=parents[0],
            parameters=_parameters(state.folder),
            written=merge_arguments(state),
            arguments=merge_arguments(state),
            parents=parents,
        )

    def _record(self, name: str, state: ModelState) -> StageRecord:
        if state.merges:
            return self._merging(name, state)
        if state.is_unknown:
            start, told = self._reference(state, "model"), stage_arguments(state)
            return StageRecord(name, "unknown", start, parameters=_parameters(state.folder), arguments=told)
        progress = progress_of(state)
        return StageRecord(
            name=name,
            kind=_kind(state),
            start=self._reference(state, "model"),
            teacher=self._teacher(state),
            parameters=_parameters(state.folder),
            written=_in_effect(state, clean_arguments(state.keys)),
            arguments=stage_arguments(state),
            sources=sources_of(state),
            steps=progress.steps,
            epochs=progress.epochs,
            metrics=progress.metrics,
            changes=_changes(state),
        )


def _changes(state: ModelState) -> tuple[dict[str, Any], ...]:
    """Keys that were changed while a state was trained, without those that name places."""
    told = []
    for note in read_changes(state.run):
        before, after = (clean_arguments({key: each[i] for key, each in note["keys"].items()}) for i in (0, 1))
        if after and (state.folder.name == FINAL_MODEL or note["step"] < step_of(state.folder)):
            told.append({"step": note["step"], "keys": {key: [before[key], after[key]] for key in after}})
    return tuple(told)


def _kind(state: ModelState) -> str:
    if state.prunes:
        return "pruning"
    if (state.folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    return "merged_adapter" if (state.folder / MERGED_ADAPTER).is_file() else "training"


def _taught(teacher: ModelState, student: ModelState) -> bool:
    """Whether a model is still the one whose identity a run noted as that of its teacher."""
    noted, revision = _noted_teacher(student), model_revision(str(teacher.folder), "key 'teacher'")
    if noted in (None, revision):
        return True
    # A teacher that was given texts is known by how it was given them, too.
    templates = {name: student.keys.get(f"teacher_{name}") for name in ("query_template", "document_template")}
    text_format = TextFormat(**{name: template for name, template in templates.items() if template is not None})
    try:
        longest = read_model_files(teacher.folder).max_length
    except UserError:
        return False
    return noted == text_teacher_identity(revision, text_format, longest)


def _noted_teacher(state: ModelState) -> str | None:
    """What a run noted of its teacher among its data: the commit on the Hub, or a digest."""
    return read_json(state.run / DATA).get(TEACHER_DATA)


def _commit(state: ModelState) -> str | None:
    """The commit of a teacher on the Hub; None if the run noted no commit."""
    noted = _noted_teacher(state)
    return noted if noted is not None and COMMIT.fullmatch(noted) else None


def _unused(name: str, taken: Any) -> str:
    """The name, with a number if another stage has it."""
    numbered, number = name, 2
    while numbered in taken:
        numbered, number = f"{name}-{number}", number + 1
    return numbered


def _parameters(folder: Path) -> int | None:
    """Parameters of a stage's model; None if its weights are no longer whole."""
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            return adapter_parameters(folder)
        return read_weights(folder, F2LLMConfig.from_pretrained(folder)).parameters
    # A damaged configuration comes out of the library as anything; the model that is packed was looked at before.
    except Exception as error:
        logger.warning("%s: its parameters are not told (%s)", folder, in_one_line(error))
        return None


def stage_arguments(state: ModelState) -> dict[str, Any]:
    """Every hyper-parameter that was in effect when a state was made."""
    if state.merges:
        return merge_arguments(state)
    if state.is_unknown:
        # A copy of a run's model still has them.
        return clean_arguments(read_json(state.folder / ARGUMENTS)) if (state.folder / ARGUMENTS).is_file() else {}
    if not state.prunes:
        return _in_effect(state, clean_arguments(read_json(state.folder / ARGUMENTS)))
    # A cut model comes without a list of them.
    defaults = {each.name: each.default for each in fields(StageArguments)}
    written = clean_arguments(state.keys)
    return {key: written.get(key, defaults[key]) for key in (*_CUT, *_TEXTS)}


def _in_effect(state: ModelState, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those that a stage of its kind does not read."""
    if state.prunes:
        return {key: value for key, value in arguments.items() if key in (*_CUT, *_TEXTS)}
    unread = {each for key, dependent in _DEPENDENT.items() if not state.keys.get(key) for each in dependent}
    return {key: value for key, value in arguments.items() if key not in unread.union(_CUT)}
