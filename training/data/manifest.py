"""The manifest: which sources there are, where their files are, and how to train on them.

A manifest is a YAML file::

    root: data                             # folder of the files, or hf://datasets/OWNER/NAME@REVISION; optional
    stage_caps: {stage1: 80000}            # maximum rows per source, by stage; optional
    sources:
      - name: webfaq_kor
        files: webfaq_kor.parquet          # a list or a glob works too
        task_type: retrieval               # retrieval, clustering or classification
        symmetric: false                   # are query and passage texts of the same kind?
        instruction: Given a question, retrieve passages that answer the question.
        languages: [kor]                   # ISO 639-3
        cap: 80000                         # maximum rows, optional
        licence: CC-BY-4.0
        stages: [stage1, stage2]           # stages that train on it; all if left out

With ``each_file: true`` an entry is a collection: each of its files is a source that is named after the file, in the
language that the file name ends with. ``name_tells_language: false`` gives every file the languages of the entry.
``published_…``, ``category``, ``instruction_from`` and ``stage_rows`` are for reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
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
# Retrieval trains with in-batch and hard negatives, the other two with hard negatives only.
TASK_TYPES = ("retrieval", "clustering", "classification")
# The list published for F2LLM v1, the prompts that mteb evaluates the released models with, or neither.
INSTRUCTION_ORIGINS = ("v1", "mteb", "written")


@dataclass(frozen=True)
class Source:
    """One set of rows, with a unique name and its files in reading order; a batch holds rows of one source."""

    name: str
    files: list[SourceFile]
    task_type: str  # one of TASK_TYPES
    instruction: str  # what the query asks for
    symmetric: bool = False  # query and passage are of the same kind: passages may get the instruction too
    languages: list[str] = field(default_factory=list)  # ISO 639-3
    cap: int | None = None  # maximum rows (deterministic sample)
    licence: str | None = None  # SPDX identifier or a short text
    category: str | None = None  # the task as the data's paper names it


@dataclass(frozen=True)
class Entry(Source):
    """One entry of a manifest: a source, or a collection whose files are sources."""

    files: list[str]  # names or patterns, relative to the data folder
    stages: list[str] = field(default_factory=list)  # that train on it; empty for all
    published_rows: int | None = None
    published_files: int | None = None
    instruction_from: str | None = None  # one of INSTRUCTION_ORIGINS
    each_file: bool = False
    name_tells_language: bool = True


@dataclass(frozen=True)
class PublishedShares:
    """What the data's paper counts: all rows, rows by ISO 639-3 code, and percent of the rows by category."""

    total_rows: int
    language_rows: dict[str, int] = field(default_factory=dict)
    category_percent: dict[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest file, before its data files are looked for."""

    path: Path
    folder: DataFolder
    entries: list[Entry]
    stage_caps: dict[str, int]
    published_shares: PublishedShares | None
    stage_rows: dict[str, int] = field(default_factory=dict)

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


_TOP_KINDS = {"sources": list, "root": str, "published_shares": dict}
_TOP_KINDS |= dict.fromkeys(("stage_caps", "stage_rows"), dict[str, int])


def read_manifest(path: Path | str, data_dir: Path | str | None = None) -> Manifest:
    """Read a manifest without looking for its files; ``data_dir`` replaces its ``root`` or folder."""
    path = Path(path)
    content = {key: value for key, value in load_yaml(path).items() if value is not None}
    _check(str(path), content, _TOP_KINDS, ["sources"])
    entries = [_entry(path, number, written) for number, written in enumerate(content["sources"], start=1)]
    shares = content.get("published_shares")
    if shares is not None:
        _check(f"{path}: key 'published_shares'", shares, get_type_hints(PublishedShares), ["total_rows"])
        shares = PublishedShares(**shares)
    root = content.get("root", ".")
    folder = DataFolder(data_dir if data_dir is not None else root if "://" in root else path.parent / root)
    caps, rows = content.get("stage_caps", {}), content.get("stage_rows", {})
    manifest = Manifest(path, folder, entries, caps, shares, rows)
    for key, stages in (("stage_caps", caps), ("stage_rows", rows)):
        for stage in stages:
            if stage not in manifest.stages:
                raise unknown_key(f"{path}: key {key!r}", stage, manifest.stages)
    return manifest


def _entry(path: Path, number: int, written: Any) -> Entry:
    where = f"{path}: source {number}"
    if isinstance(written, dict):
        where = f"{path}: source {written['name']!r}" if isinstance(written.get("name"), str) else where
        files = written.get("files")
        written = {**written, "files": [files]} if isinstance(files, str) else written
    _check(where, written, get_type_hints(Entry), ["name", "files", "task_type", "instruction"])
    if "/" in written["name"] or written["name"].startswith("."):
        raise UserError(f"{where}: the name becomes a folder; leave out '/' and a leading '.'")
    for key, known in (("task_type", TASK_TYPES), ("instruction_from", INSTRUCTION_ORIGINS)):
        if written.get(key) is not None and written[key] not in known:
            raise UserError(f"{where}: unknown {key} {written[key]!r}; use one of {', '.join(known)}")
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
        if any(type(number) in (int, float) and number <= 0 for number in numbers):
            raise UserError(f"{where}: key {key!r} cannot be {value!r}; it must be at least 1")


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
    described = {each.name: getattr(entry, each.name) for each in fields(Source)} | {"files": files, "cap": cap}
    if not entry.each_file:
        return [Source(**described)]
    own = ({"name": file.stem, "files": [file], "languages": file_languages(entry, file)} for file in files)
    return [Source(**{**described, **each}) for each in own]


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
        for file in source.files:
            if not isinstance(file, Path):
                what = f"source {source.name!r}: {file} is not on this machine"
                raise UserError(f"{what}; download the files and give their folder as --data-dir")


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
    types = task_types or TASK_TYPES
    named = [each for each in sources if any(fnmatch(each.name, pattern) for pattern in patterns or "*")]
    selected = [source for source in named if source.task_type in types]
    if not selected:
        raise UserError(f"no source is left of {len(sources)}: name more of them, or other task types")
    return selected


def write_manifest(path: Path, entries: Iterable[Mapping[str, Any]], **top: Any) -> None:
    """Write a manifest of entries and keys beside ``sources``, whole or not at all, without None and empty values.

    ``files`` are names, not patterns: ``*`` and ``[`` stand for themselves.
    """
    sources = [
        {key: value for key, value in entry.items() if value is not None and value != []}
        | {"files": [escape(str(file)) for file in entry["files"]]}
        for entry in entries
    ]
    content = {key: value for key, value in top.items() if value} | {"sources": sources}
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=119)
    write_whole(path, text)
