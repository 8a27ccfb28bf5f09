"""Training lineage of a model: the stages behind it and their data, from the files of the runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.common.run_folder import BASE_DATA, DATA, FINAL_MODEL, TEACHER_DATA, step_of
from training.config.arguments import LoraArguments, StageArguments
from training.data.instructions import TextFormat
from training.data.manifest import Entry, Manifest, find_entry_files, read_manifest
from training.data.prepared import DESCRIPTION, find_prepared
from training.distillation.teacher import text_teacher_identity
from training.evaluation.summary import known_rows
from training.models.merging import find_beside, read_merge
from training.models.model_ref import MERGED_ADAPTER, model_revision
from training.publishing.adapter import adapter_weights, local_reference
from training.publishing.hub.progress import progress_of
from training.publishing.model_files import ADAPTER_CONFIG, base_named, read_model_files
from training.publishing.record import Reference, SourceRecord, StageRecord
from training.publishing.states import COMMIT, ModelState, clean_arguments, read_json, state_of
from training.publishing.weights import read_weights
from training.stages.continuation import read_changes

logger = logging.getLogger("training")

ARGUMENTS = "training_arguments.json"
# Entries of a run's data.json that are not sources.
# Starts of a stage, its teacher, and the models among them that are outside of the lineage, as in `Lineage.outside`.
_Origins = tuple[tuple[Reference, ...], Reference | None, list[tuple[str, str]]]
_HUB_DATASET = re.compile("hf://datasets/([^/@]+/[^/@]+)")
# Keys of pruning, and of the data that it reads; all other keys are about training.
_PRUNING = ("prune_to", "prune_hidden", "prune_layers", "calibration_texts", "trim_vocabulary")
_PRUNING_DATA = (
    *("manifest_stage", "builder", "builder_options", "sources", "task_types", "cap", "source_caps"),
    *("validation_share", "on_bad_row", "max_length", "instructions", "document_instruction_share", "seed"),
)
# Keys without effect unless the key on the left is given.
_DEPENDENT = {
    "teacher": ("distillation_weight", "teacher_projection", "teacher_query_template", "teacher_document_template"),
    "lora": tuple(each.name for each in fields(LoraArguments)),
    "evaluation_sample": ("evaluation_sample", "evaluation_sample_candidates"),
    "early_stopping_patience": ("early_stopping_patience", "early_stopping_threshold"),
}


class Lineage:
    """The stages behind a model.

    Attributes:
        states: The model that each stage made, by name; predecessors and teachers come before their stage, and the
            model itself is last.
        outside: Public name and path of each model that a stage used and that is not a stage itself.
    """

    def __init__(self, state: ModelState) -> None:
        self.states: dict[str, ModelState] = {}
        self.outside: list[tuple[str, str]] = []
        self._references: dict[Path, Reference] = {}
        # What each stage started from (a merged model: its parents), and its teacher.
        self._starts: dict[str, tuple[tuple[Reference, ...], Reference | None]] = {}
        self._visit(state, ())

    def records(self) -> tuple[StageRecord, ...]:
        """Return the records of the stages."""
        return tuple(self._record(name, state) for name, state in self.states.items())

    def origins(self) -> tuple[Reference, Reference | None]:
        """Return what the model itself started from, and its teacher if it has one."""
        *_, (starts, teacher) = self._starts.values()
        return starts[0], teacher

    def _visit(self, state: ModelState, above: tuple[Path, ...]) -> Reference:
        """Add a stage after its predecessors; ``above`` are the folders that led to it."""
        folder = state.folder.resolve()
        if folder in above:
            raise UserError(
                f"{state.run}: its model comes from itself; correct 'model' or 'teacher' in its recipe.yaml"
            )
        if folder not in self._references:
            visit = self._visit_merged if state.merges else self._visit_trained
            starts, teacher, outside = visit(state, (*above, folder))
            name, number = state.name, 1
            while name in self.states:
                number += 1
                name = f"{state.name}-{number}"
            self.states[name] = state
            self._starts[name] = starts, teacher
            self._references[folder] = Reference("stage", name)
            self.outside += [each for each in outside if each not in self.outside]
        return self._references[folder]

    def _visit_trained(self, state: ModelState, above: tuple[Path, ...]) -> _Origins:
        # Some stages have a key of the whole recipe and learn nothing from the teacher.
        cut, weight = (
            state.keys.get("prune_to") or state.keys.get("trim_vocabulary"),
            state.keys.get("distillation_weight"),
        )
        taught = not cut and (weight is None or float(weight) > 0)
        keys = [key for key in ("teacher", "model") if state.keys.get(key) is not None and (key == "model" or taught)]
        before = {key: _predecessor(state, key) for key in keys}
        found = {key: self._visit(each, above) if each else _reference(state, key) for key, each in before.items()}
        start = found.get("model") or _unrecorded_start(state)
        outside = [
            (found[key].name, str(state.resolve(str(state.keys[key])))) for key in reversed(keys) if not before[key]
        ]
        return (start,), found.get("teacher"), outside

    def _visit_merged(self, state: ModelState, above: tuple[Path, ...]) -> _Origins:
        """Several states of one run are one stage: the training of the last one includes that of the others."""
        noted = read_merge(state.folder)["parents"]
        folders = [find_beside(state.folder, parent) for parent in noted]
        states = [folder and state_of(folder) for folder in folders]
        here = [each for each in states if each is not None]
        for run in dict.fromkeys(each.run.resolve() for each in here):
            of_run = [each for each in here if each.run.resolve() == run]
            reference = self._visit(max(of_run, key=_age), above)
            for each in of_run:
                self._references.setdefault(each.folder.resolve(), reference)
        starts, outside = [], []
        for parent, folder, before in zip(noted, folders, states, strict=True):
            if before is not None:
                starts.append(self._references[before.folder.resolve()])
                continue
            commit = parent.get("revision")
            starts.append(Reference("hub" if "revision" in parent else "local", parent["name"], commit))
            outside.append((parent["name"], str(folder or (parent["name"] if "revision" in parent else ""))))
        return tuple(dict.fromkeys(starts)), None, outside

    def _record(self, name: str, state: ModelState) -> StageRecord:
        starts, teacher = self._starts[name]
        known = {"parameters": _parameters(state.folder), "arguments": stage_arguments(state)}
        if state.merges:
            return StageRecord(name, "merging", starts[0], given=(*known["arguments"],), parents=starts, **known)
        if state.is_unknown:
            return StageRecord(name, "unknown", starts[0], **known)
        progress, given = progress_of(state), _in_effect(state, clean_arguments(state.keys))
        # The run's list wins where a recipe was edited since.
        known["arguments"] = {**known["arguments"], **given, **known["arguments"]}
        return StageRecord(
            name=name,
            kind=_kind(state),
            start=starts[0],
            teacher=teacher,
            **known,
            given=tuple(given),
            sources=sources_of(state),
            steps=progress.steps,
            epochs=progress.epochs,
            metrics=progress.metrics,
            changes=_changes(state),
        )


def _predecessor(state: ModelState, key: str) -> ModelState | None:
    """The model that ``model`` or ``teacher`` names, if a run made it and it is still the same."""
    before = state_of(state.resolve(str(state.keys[key])))
    changed = before is not None and key == "teacher" and not _taught(before, state)
    return None if changed else before


def _reference(state: ModelState, key: str) -> Reference:
    """What may be published of a model that no run made."""
    path = str(state.keys[key])
    if state.is_hub_name(path):
        noted = read_json(state.run / DATA).get(TEACHER_DATA) if key == "teacher" else None
        return Reference("hub", path, noted if noted and COMMIT.fullmatch(noted) else None)
    if state.resolve(path).exists():
        logger.warning(
            "%s: %s %s was not made by a run, or changed since; its stages are left out", state.name, key, path
        )
    return local_reference(path)


def _unrecorded_start(state: ModelState) -> Reference:
    if not state.is_unknown:
        return Reference("scratch")
    base = base_named(state.folder)
    return Reference("hub", base) if base else Reference("unknown")


def _age(state: ModelState) -> float:
    """Steps of a checkpoint; a finished model is newer than any."""
    is_final = state.folder.name == FINAL_MODEL or state.merges
    return float("inf") if is_final else float(state.folder.name.rpartition("-")[2])


def _kind(state: ModelState) -> str:
    if state.prunes:
        return "pruning"
    if (state.folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    return "merged_adapter" if (state.folder / MERGED_ADAPTER).is_file() else "training"


def _changes(state: ModelState) -> tuple[dict[str, Any], ...]:
    """Public keys that were changed before a state was reached."""
    public = []
    for note in read_changes(state.run):
        before, after = (clean_arguments({key: each[i] for key, each in note["keys"].items()}) for i in (0, 1))
        if after and (state.folder.name == FINAL_MODEL or note["step"] < step_of(state.folder)):
            public.append({"step": note["step"], "keys": {key: [before[key], after[key]] for key in after}})
    return tuple(public)


def _taught(teacher: ModelState, student: ModelState) -> bool:
    """Whether a model is still the teacher whose identity the student's run noted."""
    # The teacher's identity that the run noted: a commit on the Hub, or a digest.
    noted, revision = (
        read_json(student.run / DATA).get(TEACHER_DATA),
        model_revision(str(teacher.folder), "key 'teacher'"),
    )
    if noted in (None, revision):
        return True
    # The identity of a teacher that reads texts includes how it was given them.
    templates = {name: student.keys.get(f"teacher_{name}") for name in ("query_template", "document_template")}
    text_format = TextFormat(**{name: template for name, template in templates.items() if template is not None})
    try:
        return noted == text_teacher_identity(revision, text_format, read_model_files(teacher.folder).max_length)
    except UserError:
        return False


def _parameters(folder: Path) -> int | None:
    """Parameters of a stage's model; None if its weights are damaged or gone."""
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            return adapter_weights(folder).parameters
        return read_weights(folder, F2LLMConfig.from_pretrained(folder)).parameters
    # `from_pretrained` can raise any exception on a corrupt folder; the packed model itself was checked before.
    except Exception as error:
        logger.warning("%s: its parameters are left out (%s)", folder, in_one_line(error))
        return None


def stage_arguments(state: ModelState) -> dict[str, Any]:
    """Return all hyper-parameters in effect when a model was made."""
    if state.merges:
        record = read_merge(state.folder)
        names, weights = ([parent[key] for parent in record["parents"]] for key in ("name", "weight"))
        return {"method": record["method"], "models": names, "weights": weights}
    if state.is_unknown:
        # A copy of a run's model still has them.
        return clean_arguments(read_json(state.folder / ARGUMENTS)) if (state.folder / ARGUMENTS).is_file() else {}
    if not state.prunes:
        return _in_effect(state, clean_arguments(read_json(state.folder / ARGUMENTS)))
    # Pruning saves no list of arguments.
    given = clean_arguments(state.keys)
    defaults = {each.name: each.default for each in fields(StageArguments)}
    return {key: given.get(key, defaults[key]) for key in (*_PRUNING, *_PRUNING_DATA)}


def _in_effect(state: ModelState, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a stage of this kind reads."""
    if state.prunes:
        return {key: value for key, value in arguments.items() if key in (*_PRUNING, *_PRUNING_DATA)}
    unread = {each for key, dependent in _DEPENDENT.items() if not state.keys.get(key) for each in dependent}
    return {key: value for key, value in arguments.items() if key not in unread.union(_PRUNING)}


def sources_of(state: ModelState) -> tuple[SourceRecord, ...]:
    """Return the sources that a run read, in its order.

    A source whose prepared data is gone or was prepared again has what the manifest says of it, without row counts.
    """
    folder = (
        state.resolve(str(state.keys["prepared_dir"])) if state.keys.get("prepared_dir") else state.run / "prepared"
    )
    noted = read_json(state.run / DATA)
    fingerprints = {name: each for name, each in noted.items() if name not in (TEACHER_DATA, BASE_DATA)}
    prepared = [read_json(path / DESCRIPTION) for path in find_prepared(folder, fingerprints)]
    found = {name: {} for name in fingerprints} | {each["name"]: each for each in prepared}
    manifest = _manifest(state)
    on_hub = _HUB_DATASET.match(str(manifest.folder)) if manifest is not None else None
    records = [_source(name, each, _entry_of(name, manifest), on_hub and on_hub[1]) for name, each in found.items()]
    unknown = [record.name for record in records if record.rows is None]
    if unknown:
        logger.warning("%s: the prepared data is gone, rows are left out (%s)", state.name, ", ".join(unknown))
    return tuple(records)


def _source(name: str, prepared: Mapping[str, Any], entry: Entry | None, dataset: str | None) -> SourceRecord:
    rows = prepared.get("rows") or {}
    return SourceRecord(
        name,
        task_type=prepared.get("task_type", entry and entry.task_type),
        languages=tuple(prepared.get("languages", entry.languages if entry else ())),
        rows=rows.get("train"),
        validation_rows=rows.get("validation"),
        instruction=prepared.get("instruction"),
        licence=entry and entry.licence,
        dataset=dataset,
    )


def _manifest(state: ModelState) -> Manifest | None:
    """The run's manifest; None if it is gone."""
    path = state.resolve(str(state.keys["manifest"])) if state.keys.get("manifest") else None
    if path is None or not path.is_file():
        return None
    data_dir = state.keys.get("data_dir")
    if data_dir is not None and "://" not in str(data_dir):
        data_dir = state.resolve(str(data_dir))
    try:
        return read_manifest(path, data_dir)
    except UserError as error:
        logger.warning("licences of %s are left out: %s", state.name, error)
        return None


def language_rows_of(state: ModelState) -> dict[str, int]:
    """Return the training rows by language, from the files of the manifest; empty if these are not local."""
    manifest = _manifest(state)
    if manifest is None or not isinstance(manifest.folder.root, Path):
        return {}
    return known_rows(manifest.path) or {}


def _entry_of(name: str, manifest: Manifest | None) -> Entry | None:
    """The manifest's entry of a source, or of the collection that holds its file; None if that is uncertain."""
    if manifest is None:
        return None
    for entry in manifest.entries:
        if entry.name == name and not entry.each_file:
            return entry
    matching = [
        entry
        for entry in manifest.entries
        if entry.each_file and any(fnmatch(name, Path(file).stem) for file in entry.files)
    ]
    if isinstance(manifest.folder.root, Path):
        # The name may match the pattern of another folder, too: the files decide, as far as they are there.
        stems = [
            {file.stem for files in find_entry_files(manifest, each).values() for file in files} for each in matching
        ]
        matching = [each for each, there in zip(matching, stems, strict=True) if name in there or not there]
    return matching[0] if len(matching) == 1 else None
