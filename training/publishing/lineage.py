"""Training lineage of a model: the stages behind it and their data, from the files of the runs."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import fields, replace
from fnmatch import fnmatch
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError, in_one_line
from training.common.run_folder import DATA, FINAL_MODEL, PRUNING_PLAN, RECIPE, TEACHER_DATA, last_checkpoint, step_of
from training.common.yaml_file import load_yaml
from training.config.arguments import LoraArguments, StageArguments
from training.data.instructions import TextFormat
from training.data.manifest import Entry, Manifest, find_entry_files, read_manifest
from training.data.prepared import DESCRIPTION, find_prepared
from training.distillation.teacher import text_teacher_identity
from training.evaluation.summary import known_rows
from training.models.merging import find_beside, read_merge
from training.models.model_ref import MERGED_ADAPTER, model_revision
from training.publishing.adapter import local_reference
from training.publishing.model_files import ADAPTER_CONFIG, adapter_weights, base_named, read_model_files, read_weights
from training.publishing.record import Reference, SourceRecord, StageRecord
from training.publishing.states import COMMIT, ModelState, clean_arguments, read_json, state_of
from training.stages.continuation import read_changes

logger = logging.getLogger("training")

ARGUMENTS = "training_arguments.json"
STATE = "trainer_state.json"
# Endings of metrics that measure the machine, not the model.
TIMING = ("_runtime", "_per_second", "_preparation_time")
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
    "score_distillation_weight": ("score_distillation_weight", "teacher_temperature"),
    "lora": tuple(each.name for each in fields(LoraArguments)),
    "evaluation_sample": ("evaluation_sample", "evaluation_sample_candidates"),
    "early_stopping_patience": ("early_stopping_patience", "early_stopping_threshold"),
}


class Lineage:
    """The stages behind a model."""

    def __init__(self, state: ModelState) -> None:
        self.state = state
        # The model that each stage made, by name; those that it was made of come before it, and `state` is last.
        self.states: dict[str, ModelState] = {}
        # Public name and path of each model that a stage used and that is not a stage itself.
        self.outside: list[tuple[str, str]] = []
        self._references: dict[Path, Reference] = {}
        # What each stage started from (a merged model: its parents), and its teacher.
        self._starts: dict[str, tuple[tuple[Reference, ...], Reference | None]] = {}
        self._visit(state, ())

    @cached_property
    def records(self) -> tuple[StageRecord, ...]:
        """The records of the stages."""
        return tuple(self._record(name, state) for name, state in self.states.items())

    def origins(self) -> tuple[Reference, Reference | None]:
        """Return what the model itself started from, and its teacher if it has one."""
        *_, (starts, teacher) = self._starts.values()
        return starts[0], teacher

    def _visit(self, state: ModelState, above: tuple[Path, ...]) -> Reference:
        """Add a stage after its predecessors; ``above`` are the folders that led to it."""
        folder = state.folder.resolve()
        if folder in above:
            raise UserError(f"{state.run}: its model comes from itself; correct 'model' or 'teacher' in {RECIPE}")
        if folder not in self._references:
            visit = self._visit_merged if state.kind == "merging" else self._visit_trained
            origins = visit(state, (*above, folder))
            name, number = state.name, 1
            while name in self.states:
                number += 1
                name = f"{state.name}-{number}"
            self.states[name], self._starts[name] = state, origins
            self._references[folder] = Reference("stage", name)
        return self._references[folder]

    def _visit_trained(self, state: ModelState, above: tuple[Path, ...]) -> tuple[tuple[Reference], Reference | None]:
        found: dict[str, Reference] = {}
        # Some stages have the key of the whole recipe and learn nothing from the teacher.
        weight, by_scores = (state.keys.get(f"{name}distillation_weight") for name in ("", "score_"))
        is_taught = weight is None or float(weight) > 0 or float(by_scores or 0) > 0
        is_taught = state.kind != "pruning" and (is_taught or state.keys.get("mask_false_negatives") is not None)
        for key in ("teacher", "model") if is_taught else ("model",):
            path = state.path_of(key)
            if path is None:
                continue
            before = state_of(path)
            if before is not None and (key == "model" or _taught(before, state)):
                found[key] = self._visit(before, above)
                continue
            name = str(state.keys[key])
            if state.is_hub_name(name):
                noted = read_json(state.run / DATA).get(TEACHER_DATA, "") if key == "teacher" else ""
                found[key] = Reference("hub", name, noted if COMMIT.fullmatch(noted) else None)
            else:
                logger.warning("%s: its %s %s is gone or changed; the stages before are unknown", state.name, key, name)
                found[key] = local_reference(name)
            self.outside.append((found[key].name, str(path)))
        start = found.get("model")
        if start is None and state.kind == "unknown":
            base = base_named(state.folder)
            start = Reference("hub", base) if base else Reference("unknown")
        return (start or Reference("scratch"),), found.get("teacher")

    def _visit_merged(self, state: ModelState, above: tuple[Path, ...]) -> tuple[tuple[Reference, ...], None]:
        """Several states of one run are one stage: the training of the last one includes that of the others."""
        noted = read_merge(state.folder)["parents"]
        folders = [find_beside(state.folder, parent) for parent in noted]
        states = [folder and state_of(folder) for folder in folders]
        newest: dict[Path, ModelState] = {}
        for each in filter(None, states):
            run = each.run.resolve()
            newest[run] = max(newest.get(run, each), each, key=_age)
        references = {run: self._visit(each, above) for run, each in newest.items()}
        starts = []
        for parent, folder, before in zip(noted, folders, states, strict=True):
            if before is not None:
                starts.append(references[before.run.resolve()])
                continue
            name, is_on_hub = parent["name"], "revision" in parent
            starts.append(Reference("hub" if is_on_hub else "local", name, parent.get("revision")))
            self.outside.append((name, str(folder or (name if is_on_hub else ""))))
        return tuple(dict.fromkeys(starts)), None

    def _record(self, name: str, state: ModelState) -> StageRecord:
        starts, teacher = self._starts[name]
        arguments = stage_arguments(state)
        record = StageRecord(name, state.kind, starts[0], teacher, _parameters(state.folder), arguments=arguments)
        if record.kind == "merging":
            return replace(record, given=tuple(arguments), parents=starts)
        if record.kind == "unknown":
            return record
        given = _in_effect(state, clean_arguments(state.keys))
        return replace(
            record,
            given=tuple(given),
            # The run's list wins where a recipe was edited since.
            arguments={**arguments, **given, **arguments},
            sources=sources_of(state),
            **progress_of(state),
            changes=_changes(state),
        )


def _age(state: ModelState) -> float:
    """Steps of a checkpoint; a finished model is newer than any."""
    is_final = state.folder.name == FINAL_MODEL or state.kind == "merging"
    return float("inf") if is_final else step_of(state.folder)


def _changes(state: ModelState) -> tuple[dict[str, Any], ...]:
    public = []
    for note in read_changes(state.run):
        before, after = (clean_arguments({key: each[i] for key, each in note["keys"].items()}) for i in (0, 1))
        if after and (state.folder.name == FINAL_MODEL or note["step"] < step_of(state.folder)):
            public.append({"step": note["step"], "keys": {key: [before[key], after[key]] for key in after}})
    return tuple(public)


def _taught(teacher: ModelState, student: ModelState) -> bool:
    """Whether a model still is the teacher that the student's run noted: a commit on the Hub, or a digest."""
    noted = read_json(student.run / DATA).get(TEACHER_DATA)
    revision = model_revision(str(teacher.folder), "key 'teacher'")
    if noted in (None, revision):
        return True
    # The identity of a teacher that reads texts includes how it was given them.
    templates = {name: student.keys.get(f"teacher_{name}") for name in ("query_template", "document_template")}
    text_format = TextFormat(**{name: template for name, template in templates.items() if template is not None})
    with suppress(UserError):
        return noted == text_teacher_identity(revision, text_format, read_model_files(teacher.folder).max_length)
    return False


def _parameters(folder: Path) -> int | None:
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
    if state.kind == "merging":
        record = read_merge(state.folder)
        names, weights = ([parent[key] for parent in record["parents"]] for key in ("name", "weight"))
        return {"method": record["method"], "models": names, "weights": weights}
    if state.kind == "unknown":
        # A copy of a run's model still has them.
        return clean_arguments(read_json(state.folder / ARGUMENTS)) if (state.folder / ARGUMENTS).is_file() else {}
    if state.kind != "pruning":
        return _in_effect(state, clean_arguments(read_json(state.folder / ARGUMENTS)))
    # Pruning saves no list of arguments.
    given, plan = clean_arguments(state.keys), state.run / PRUNING_PLAN
    if given.get("prune_hidden") is None and plan.is_file():
        given["prune_hidden"] = load_yaml(plan)["methods"]["hidden"]
    defaults = {each.name: each.default for each in fields(StageArguments)}
    return {key: given.get(key, defaults[key]) for key in (*_PRUNING, *_PRUNING_DATA)}


def _in_effect(state: ModelState, arguments: dict[str, Any]) -> dict[str, Any]:
    if state.kind == "pruning":
        return {key: value for key, value in arguments.items() if key in (*_PRUNING, *_PRUNING_DATA)}
    unread = {each for key, dependent in _DEPENDENT.items() if not state.keys.get(key) for each in dependent}
    return {key: value for key, value in arguments.items() if key not in unread.union(_PRUNING)}


def progress_of(state: ModelState) -> dict[str, Any]:
    """Return ``steps``, ``epochs`` and ``metrics`` of a :class:`StageRecord`, as the run's log has them for a model.

    The finished model is that of the last step, or of the best evaluated one with ``load_best_model_at_end``. Nothing
    is known of it without the checkpoint of the last step.
    """
    folder, unknown = state.folder, {"steps": None, "epochs": None, "metrics": {}}
    if (folder / MERGED_ADAPTER).is_file():
        # The base merged with the run's adapter, or with one of its checkpoints.
        folder = state.run / Path(read_json(folder / MERGED_ADAPTER)["adapter"]["name"]).name
    # A checkpoint may be kept outside its run.
    checkpoint = last_checkpoint(state.run) if folder.name == FINAL_MODEL else folder
    if checkpoint is None:
        return unknown
    trained = read_json(checkpoint / STATE)
    step = trained["global_step"]
    ended = step >= trained["max_steps"] or state.keys.get("early_stopping_patience") is not None
    if not ended and folder is not checkpoint:
        return unknown
    if state.folder.name == FINAL_MODEL and state.keys.get("load_best_model_at_end"):
        step = trained["best_global_step"] or step
    history = [entry for entry in trained["log_history"] if entry["step"] <= step]
    epochs = history[-1]["epoch"] if history and history[-1]["step"] == step else trained["epoch"]
    evaluated = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    metrics = {key: value for key, value in evaluated.items() if key.startswith("eval_") and not key.endswith(TIMING)}
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if losses:
        metrics["train_loss"] = losses[-1]
    return {"steps": step, "epochs": epochs, "metrics": metrics}


def sources_of(state: ModelState) -> tuple[SourceRecord, ...]:
    """Return the sources that a run read, in its order.

    A source whose prepared data is gone or was prepared again has what the manifest says of it, without row counts.
    """
    folder = state.path_of("prepared_dir") or state.run / "prepared"
    noted = read_json(state.run / DATA)
    fingerprints = {name: each for name, each in noted.items() if not name.endswith("/")}
    found = (read_json(path / DESCRIPTION) for path in find_prepared(folder, fingerprints))
    prepared = {each["name"]: each for each in found}
    if gone := [name for name in fingerprints if name not in prepared]:
        logger.warning("%s: the prepared data is gone, rows are left out (%s)", state.name, ", ".join(gone))
    manifest = _manifest(state)
    entries = _entries(manifest) if manifest else []
    on_hub = _HUB_DATASET.match(str(manifest.folder)) if manifest else None
    records = []
    for name in fingerprints:
        fitting = [entry for entry, names in entries if any(fnmatch(name, each) for each in names)]
        # Of several collections, none is certain.
        alone = [entry for entry in fitting if not entry.each_file] or fitting
        entry = alone[0] if len(alone) == 1 else None
        described = prepared.get(name, {})
        rows = described.get("rows", {})
        record = SourceRecord(
            name,
            task_type=described.get("task_type", entry and entry.task_type),
            languages=tuple(described.get("languages", entry.languages if entry else ())),
            rows=rows.get("train"),
            validation_rows=rows.get("validation"),
            instruction=described.get("instruction"),
            licence=entry and entry.licence,
            dataset=on_hub and on_hub[1],
        )
        records.append(record)
    return tuple(records)


def _manifest(state: ModelState) -> Manifest | None:
    path, data_dir = state.path_of("manifest"), state.keys.get("data_dir")
    if path is None or not path.is_file():
        return None
    try:
        return read_manifest(path, data_dir if "://" in str(data_dir) else state.path_of("data_dir"))
    except UserError as error:
        logger.warning("licences of %s are left out: %s", state.name, error)
        return None


def _entries(manifest: Manifest) -> list[tuple[Entry, list[str]]]:
    """Each entry of a manifest with the names of its sources; patterns of them if its files are not here."""
    found = []
    for entry in manifest.entries:
        names = [escape(entry.name)]
        if entry.each_file:
            # The name may match the pattern of another folder, too: the files decide, as far as they are there.
            files = find_entry_files(manifest, entry) if isinstance(manifest.folder.root, Path) else {}
            names = [escape(file.stem) for each in files.values() for file in each]
        found.append((entry, names or [Path(file).stem for file in entry.files]))
    return found


def language_rows_of(state: ModelState) -> dict[str, int]:
    """Return the training rows by language, from the files of the manifest; empty if these are not local."""
    manifest = _manifest(state)
    return (known_rows(manifest.path) or {}) if manifest and isinstance(manifest.folder.root, Path) else {}
