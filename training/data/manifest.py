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

``category``, ``published_rows``, ``published_files`` and ``instruction_from`` (v1, mteb or written) are for reports, as
are ``stage_rows`` (published rows under the caps, by stage) and ``published_shares`` beside ``sources``.

With ``each_file: true`` an entry is a collection: each of its files is a source that is named after the file, in the
language that the file name ends with. ``name_tells_language: false`` gives every file the languages of the entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

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
    """One set of rows; a batch holds rows of one source.

    The name is unique: the log and the prepared folder use it. Files are in reading order.
    """

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


_ENTRY_KINDS = get_type_hints(Entry)
_TOP_KINDS = {"sources": object, "root": str, "published_shares": dict}
_TOP_KINDS |= dict.fromkeys(("stage_caps", "stage_rows"), dict[str, int])


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


def read_manifest(path: Path | str, data_dir: Path | str | None = None) -> Manifest:
    """Read a manifest without looking for its files; ``data_dir`` replaces its ``root`` or folder."""
    path = Path(path)
    content = {key: value for key, value in load_yaml(path, named_in_file=True).items() if value is not None}
    _check(str(path), content, _TOP_KINDS)
    if not content.get("sources") or not isinstance(content["sources"], list):
        raise UserError(f"{path}: key 'sources' must list at least one source")
    entries: dict[str, Entry] = {}
    for number, written in enumerate(content["sources"], start=1):
        entry = _entry(path, number, written)
        if entry.name in entries:
            raise UserError(f"{path}: two sources are named {entry.name!r}; rename one of them")
        entries[entry.name] = entry
    shares = content.get("published_shares")
    if shares is not None:
        _check(f"{path}: key 'published_shares'", shares, get_type_hints(PublishedShares), ["total_rows"])
        shares = PublishedShares(**shares)
    root = content.get("root", ".")
    if not root:
        raise UserError(f"{path}: key 'root' cannot be ''; give a folder or an address such as hf://datasets/…")
    folder = DataFolder(data_dir if data_dir is not None else root if "://" in root else path.parent / root)
    caps, rows = content.get("stage_caps", {}), content.get("stage_rows", {})
    manifest = Manifest(path, folder, list(entries.values()), caps, shares, rows)
    for stage in (*caps, *rows):
        if stage not in manifest.stages:
            key = "stage_caps" if stage in caps else "stage_rows"
            raise unknown_key(f"{path}: key {key!r}", stage, manifest.stages)
    return manifest


def _entry(path: Path, number: int, written: Any) -> Entry:
    where = f"{path}: source {number}"
    if isinstance(written, dict):
        where = f"{path}: source {written['name']!r}" if isinstance(written.get("name"), str) else where
        files = written.get("files")
        written = {**written, "files": [files]} if isinstance(files, str) else written
    _check(where, written, _ENTRY_KINDS, ["name", "files", "task_type", "instruction"])
    check_name(where, written["name"])
    for key, known in (("task_type", TASK_TYPES), ("instruction_from", INSTRUCTION_ORIGINS)):
        if written.get(key) is not None and written[key] not in known:
            raise UserError(f"{where}: unknown {key} {written[key]!r}; use one of {', '.join(known)}")
    return Entry(**written)


def _check(where: str, written: Any, kinds: Mapping[str, Any], required: Sequence[str] = ()) -> None:
    """Check the keys of a mapping and the types of their values."""
    if not isinstance(written, dict):
        raise UserError(f"{where}: expected a mapping of keys to values, got {written!r} ({type(written).__name__})")
    for key in written:
        if key not in kinds:
            raise unknown_key(where, key, list(kinds))
    for key in required:
        if not written.get(key):
            raise UserError(f"{where}: key {key!r} is missing; add it")
    for key, value in written.items():
        if not _fits(value, kinds[key]):
            least = "; it must be at least 1" if type(value) is int else "; see the manifest format"
            raise UserError(f"{where}: key {key!r} cannot be {value!r}{least}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is dict:
        names_fit = isinstance(value, dict) and _fits(list(value), list[str])
        return names_fit and all(_fits(each, get_args(kind)[1]) for each in value.values())
    if get_origin(kind) is list:
        # YAML reads the language code `no` as false.
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    # To Python, true is an integer.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) and (not isinstance(value, int | float) or value > 0)


def check_name(where: str, name: str) -> None:
    """Refuse a source's name that cannot be the name of a folder."""
    if "/" in name or name.startswith("."):
        raise UserError(f"{where}: the name {name!r} becomes a folder; leave out '/' and a leading '.'")


def load_manifest(path: Path | str, data_dir: Path | str | None = None, stage: str | None = None) -> list[Source]:
    """Read a manifest and find the files of its sources.

    Args:
        path: The manifest.
        data_dir: Folder or address of the files, instead of the manifest's ``root`` or folder.
        stage: Load only the sources of this stage, under its cap.
    """
    manifest = read_manifest(path, data_dir)
    sources: dict[str, Source] = {}
    for entry in manifest.of_stage(stage):
        for source in _sources(manifest, entry, manifest.cap_of(entry, stage)):
            if source.name in sources:
                raise UserError(
                    f"{path}: two sources are named {source.name!r}, the second one in {entry.name!r}; "
                    "rename one of them or narrow its 'files'"
                )
            sources[source.name] = source
    return list(sources.values())


def _sources(manifest: Manifest, entry: Entry, cap: int | None) -> list[Source]:
    found = find_entry_files(manifest, entry)
    where = f"{manifest.path}: source {entry.name!r}"
    for pattern, matches in found.items():
        if not matches:
            raise UserError(
                f"{where}: no file matches {manifest.folder.path(pattern)}; download or build it, or correct 'files' "
                f"({RULE})"
            )
    files = list(dict.fromkeys(file for matches in found.values() for file in matches))
    described = {**{each.name: getattr(entry, each.name) for each in fields(Source)}, "files": files, "cap": cap}
    if not entry.each_file:
        return [Source(**described)]
    for file in files:
        check_name(where, file.stem)
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
                raise UserError(
                    f"source {source.name!r}: {file} is not on this machine; download the files and give their folder "
                    "as --data-dir"
                )


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
    selected = [
        source
        for source in sources
        if any(fnmatch(source.name, pattern) for pattern in patterns or "*")
        and source.task_type in (task_types or TASK_TYPES)
    ]
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
