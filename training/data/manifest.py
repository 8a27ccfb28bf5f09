"""The manifest: which sources there are, where their files are, and how to train on them (keys: README.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from training.common.errors import UserError
from training.common.languages import languages_in_name
from training.common.outputs import write_whole
from training.common.yaml_file import RULE, load_yaml, unknown_key
from training.data.storage import DataFolder, SourceFile

# The name of a manifest that a command writes.
MANIFEST = "manifest.yaml"
# Retrieval trains with in-batch and hard negatives, the next two with hard negatives only, similarity with scores.
TASK_TYPES = ("retrieval", "clustering", "classification", "similarity")
WITH_NEGATIVES = TASK_TYPES[:3]


@dataclass(frozen=True)
class Source:
    """One set of rows, with a unique name and its files in reading order; a batch holds rows of one source."""

    name: str
    files: list[SourceFile]
    task_type: str  # one of TASK_TYPES
    instruction: str | None = None  # what the query asks for; None for the query prompt of the model it trains
    symmetric: bool = False  # query and passage are of the same kind: passages may get the instruction too
    languages: list[str] = field(default_factory=list)  # ISO 639-3
    cap: int | None = None  # maximum rows (deterministic sample)
    licence: str | None = None  # SPDX identifier or a short text
    category: str | None = None  # the task as the data's paper names it
    stages: list[str] = field(default_factory=list)  # that train on it; empty for all
    instruction_from: str | None = None  # list of F2LLM ("v1"), prompts of mteb ("mteb"), or neither ("written")
    weight: int | float = 1  # factor of its share of an epoch


@dataclass(frozen=True)
class Entry(Source):
    """One entry of a manifest: a source, or a collection whose files are sources."""

    files: list[str]  # names or patterns, relative to the data folder
    published_rows: int | None = None
    published_files: int | None = None
    each_file: bool = False
    name_tells_language: bool = True


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest file, before its data files are looked for."""

    path: Path
    folder: DataFolder
    entries: list[Entry]
    stage_caps: dict[str, int]
    stage_rows: dict[str, int]
    published_language_rows: dict[str, int]  # by ISO 639-3 code

    @property
    def stages(self) -> list[str]:
        """All stages that entries name, sorted."""
        return sorted({stage for entry in self.entries for stage in entry.stages})

    def of_stage(self, stage: str | None) -> list[Entry]:
        """Return the entries that a stage trains on; all for None."""
        if stage is not None and stage not in self.stages:
            known = ", ".join(self.stages) or "none"
            raise UserError(f"{self.path}: no source names the stage {stage!r}; there are {known}")
        return [entry for entry in self.entries if stage is None or not entry.stages or stage in entry.stages]

    def cap_of(self, entry: Entry, stage: str | None) -> int | None:
        """Return the maximum rows of each source of an entry in a stage."""
        caps = (entry.cap, self.stage_caps.get(stage) if stage is not None else None)
        return min((cap for cap in caps if cap is not None), default=None)


# A source that counts as its rows do.
_EVEN = ("weight", 1)
_COUNTS = ("stage_caps", "stage_rows", "published_language_rows")
_TOP_KINDS = {"sources": list, "root": str, **dict.fromkeys(_COUNTS, dict[str, int])}


def read_manifest(path: Path | str, data_dir: Path | str | None = None) -> Manifest:
    """Read a manifest without looking for its files; ``data_dir`` replaces its ``root`` or folder."""
    path = Path(path)
    content = {key: value for key, value in load_yaml(path).items() if value is not None}
    _check(str(path), content, _TOP_KINDS, ["sources"])
    entries = [_entry(path, number, written) for number, written in enumerate(content["sources"], start=1)]
    root = content.get("root", ".")
    folder = DataFolder(data_dir if data_dir is not None else root if "://" in root else path.parent / root)
    manifest = Manifest(path, folder, entries, *(content.get(key, {}) for key in _COUNTS))
    for key in ("stage_caps", "stage_rows"):
        for stage in content.get(key, {}):
            if stage not in manifest.stages:
                raise unknown_key(f"{path}: key {key!r}", stage, manifest.stages)
    return manifest


def _entry(path: Path, number: int, written: Any) -> Entry:
    named = isinstance(written, dict) and isinstance(written.get("name"), str)
    where = f"{path}: source {repr(written['name']) if named else number}"
    if isinstance(written, dict) and isinstance(written.get("files"), str):
        written = {**written, "files": [written["files"]]}
    _check(where, written, get_type_hints(Entry), ["name", "files", "task_type"])
    if written.get("instruction") == "":
        raise UserError(f"{where}: key 'instruction' is empty; leave it out for the query prompt of the model")
    if "/" in written["name"] or written["name"].startswith("."):
        raise UserError(f"{where}: the name becomes a folder; leave out '/' and a leading '.'")
    if written["task_type"] not in TASK_TYPES:
        raise UserError(f"{where}: unknown task_type {written['task_type']!r}; use one of {', '.join(TASK_TYPES)}")
    return Entry(**written)


def _check(where: str, written: Any, kinds: Mapping[str, Any], required: Sequence[str]) -> None:
    """Check the keys of a mapping and the types of their values; all numbers must be positive."""
    if not isinstance(written, dict):
        raise UserError(f"{where}: expected a mapping of keys to values, got {written!r}")
    for key in written:
        if key not in kinds:
            raise unknown_key(where, key, list(kinds))
    for key in required:
        if not written.get(key):
            raise UserError(f"{where}: key {key!r} is missing; add it")
    for key, value in written.items():
        try:
            # YAML reads the language code `no` as false.
            type_validator(key, value, kinds[key])
        except TypeError:
            raise UserError(f"{where}: key {key!r} cannot be {value!r}; see the manifest format") from None
        numbers = value.values() if isinstance(value, dict) else [value]
        if any(type(number) in (int, float) and not 0 < number < math.inf for number in numbers):
            least = "more than 0" if key == "weight" else "at least 1"
            raise UserError(f"{where}: key {key!r} cannot be {value!r}; it must be {least}")


def load_manifest(path: Path | str, data_dir: Path | str | None = None, stage: str | None = None) -> list[Source]:
    """Read a manifest and find the files of its sources, or of those of one stage, under its cap.

    ``data_dir`` is the folder or address of the files, instead of the manifest's ``root`` or folder.
    """
    manifest = read_manifest(path, data_dir)
    sources: dict[str, Source] = {}
    for entry in manifest.of_stage(stage):
        for source in _sources(manifest, entry, manifest.cap_of(entry, stage)):
            if source.name in sources:
                what = f"{path}: two sources are named {source.name!r}, the second one in {entry.name!r}"
                raise UserError(f"{what}; rename one of them or narrow its 'files'")
            sources[source.name] = source
    return list(sources.values())


def _sources(manifest: Manifest, entry: Entry, cap: int | None) -> list[Source]:
    found = find_entry_files(manifest, entry)
    for pattern, matches in found.items():
        if not matches:
            what = f"{manifest.path}: source {entry.name!r}: no file matches {manifest.folder.path(pattern)}"
            raise UserError(f"{what}; download or build it, or correct 'files' ({RULE})")
    files = list(dict.fromkeys(file for matches in found.values() for file in matches))
    described = {each.name: getattr(entry, each.name) for each in fields(Source)}
    source = Source(**{**described, "files": files, "cap": cap})
    if not entry.each_file:
        return [source]
    return [replace(source, name=file.stem, files=[file], languages=file_languages(entry, file)) for file in files]


def find_entry_files(manifest: Manifest, entry: Entry) -> dict[str, list[SourceFile]]:
    """Return the files of an entry by pattern; a pattern without matches has an empty list."""
    return {pattern: manifest.folder.find(pattern) for pattern in entry.files}


def file_languages(entry: Entry, file: SourceFile) -> list[str]:
    """Return the languages of one file of a collection: those in its name, or else all of the collection's."""
    named = languages_in_name(file.stem, entry.languages) if entry.name_tells_language else []
    return named or entry.languages


def require_local(sources: Sequence[Source]) -> None:
    """Refuse remote files, for work that reads them several times."""
    for source in sources:
        if remote := [file for file in source.files if not isinstance(file, Path)]:
            what = f"source {source.name!r}: {remote[0]} is remote"
            raise UserError(f"{what}; download it and give its folder as --data-dir")


def select_sources(
    sources: Sequence[Source], patterns: Sequence[str] | None = None, task_types: Sequence[str] | None = None
) -> list[Source]:
    """Keep the sources whose name matches a pattern (``*`` as in file names) and whose task type is listed."""
    for task_type in task_types or []:
        if task_type not in TASK_TYPES:
            raise UserError(f"unknown task type {task_type!r}; use one of {', '.join(TASK_TYPES)}")
    for pattern in patterns or []:
        if not any(fnmatch(source.name, pattern) for source in sources):
            raise UserError(f"no source fits {pattern!r}; there are {', '.join(source.name for source in sources)}")
    named = [each for each in sources if any(fnmatch(each.name, pattern) for pattern in patterns or "*")]
    selected = [source for source in named if source.task_type in (task_types or TASK_TYPES)]
    if not selected:
        raise UserError(f"no source is left of {len(sources)}: name more of them, or other task types")
    return selected


def write_manifest(path: Path, entries: Iterable[Mapping[str, Any]], **top: Any) -> None:
    """Write a manifest of entries and keys beside ``sources``, whole or not at all, without None, empty and 1 weights.

    ``files`` are names, not patterns: ``*`` and ``[`` stand for themselves. Caps of stages that no entry names are left
    out.
    """
    sources = [
        {key: value for key, value in entry.items() if value is not None and value != [] and (key, value) != _EVEN}
        | {"files": [escape(str(file)) for file in entry["files"]]}
        for entry in entries
    ]
    stages = {stage for source in sources for stage in source.get("stages", [])}
    top["stage_caps"] = {stage: cap for stage, cap in top.get("stage_caps", {}).items() if stage in stages}
    content = {key: value for key, value in top.items() if value} | {"sources": sources}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=119)
    write_whole(path, text)
