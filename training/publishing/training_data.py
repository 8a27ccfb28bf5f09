"""What a run was trained on, from its own files: prepared sources, the record of their fingerprints, the manifest."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.run_folder import DATA
from training.data.manifest import find_entry_files
from training.data.manifest_file import Entry, Manifest, read_manifest
from training.data.prepared import DESCRIPTION, find_prepared
from training.evaluation.resources import known_rows
from training.publishing.record import SourceRecord
from training.publishing.states import ModelState, read_json

logger = logging.getLogger("training")

# What stands among the sources' fingerprints for the teacher.
TEACHER_DATA, _BASE_DATA = "the teacher", "the base"
_HUB_DATASET = re.compile("hf://datasets/([^/@]+/[^/@]+)")


def sources_of(state: ModelState) -> tuple[SourceRecord, ...]:
    """The sources that a run trained on, or calibrated with; in the order of the run.

    A source whose prepared data is gone, or was prepared anew since, is told by what the manifest says of it, without
    its numbers of rows.
    """
    folder = _prepared_folder(state)
    noted = state.run / DATA
    # Prunings of earlier versions kept no record.
    fingerprints: Mapping[str, str] = {} if state.prunes and not noted.exists() else read_json(noted)
    of_sources = {name: each for name, each in fingerprints.items() if name not in (TEACHER_DATA, _BASE_DATA)}
    there = [read_json(path / DESCRIPTION) for path in find_prepared(folder, of_sources)]
    found = {name: {} for name in of_sources} | {described["name"]: described for described in there}
    manifest = _manifest(state)
    entries, dataset = {name: _entry_of(name, manifest) for name in found}, _hub_dataset(manifest)
    records = [_record(name, described, entries[name], dataset) for name, described in found.items()]
    unknown = [record.name for record in records if record.rows is None]
    if unknown:
        logger.warning("%s: the prepared data is gone, rows are not told (%s)", state.name, ", ".join(unknown))
    return tuple(records)


def _prepared_folder(state: ModelState) -> Path:
    written = state.keys.get("prepared_dir")
    return state.place(str(written)) if written else state.run / "prepared"


def _manifest(state: ModelState) -> Manifest | None:
    """The run's manifest; None if it is gone."""
    manifest = state.place(str(state.keys["manifest"])) if state.keys.get("manifest") else None
    if manifest is None or not manifest.is_file():
        return None
    data_dir = state.keys.get("data_dir")
    if data_dir is not None and "://" not in str(data_dir):
        data_dir = state.place(str(data_dir))
    try:
        return read_manifest(manifest, data_dir)
    except UserError as error:
        logger.warning("licences of %s are not told: %s", state.name, error)
        return None


def language_rows_of(state: ModelState) -> dict[str, int]:
    """Training rows by language that the run's manifest names; none if its data is gone, remote or does not tell."""
    manifest = _manifest(state)
    if manifest is None or not isinstance(manifest.folder.root, Path):
        return {}
    return known_rows(manifest.path) or {}


def _hub_dataset(manifest: Manifest | None) -> str | None:
    """Name on the Hub of the data that a manifest is about."""
    found = _HUB_DATASET.match(str(manifest.folder)) if manifest is not None else None
    return found[1] if found else None


def _entry_of(name: str, manifest: Manifest | None) -> Entry | None:
    """The entry of a source: of its name, or the collection that its file is in; None if that is not certain."""
    entries = manifest.entries if manifest else []
    for entry in entries:
        if entry.name == name and not entry.each_file:
            return entry
    collections = [each for each in entries if each.each_file]
    fitting = [each for each in collections if any(fnmatch(name, Path(file).stem) for file in each.files)]
    if manifest is not None and isinstance(manifest.folder.root, Path):
        # The pattern of another folder may fit the name, too. Where all files are gone, nothing else is known.
        names = [_names_of(manifest, each) for each in fitting]
        fitting = [each for each, there in zip(fitting, names, strict=True) if name in there or not there]
    return fitting[0] if len(fitting) == 1 else None


def _names_of(manifest: Manifest, entry: Entry) -> set[str]:
    """The sources of a collection whose files are on this machine."""
    return {file.stem for files in find_entry_files(manifest, entry).values() for file in files}


def _record(name: str, described: Mapping[str, Any], entry: Entry | None, dataset: str | None) -> SourceRecord:
    licence = entry.licence if entry else None
    if not described:
        task_type, languages = (entry.task_type, tuple(entry.languages)) if entry else (None, ())
        return SourceRecord(name, task_type, languages, None, None, None, licence, dataset)
    rows = described["rows"]
    return SourceRecord(
        name,
        described["task_type"],
        tuple(described["languages"]),
        rows["train"],
        rows["validation"],
        described["instruction"],
        licence,
        dataset,
    )
