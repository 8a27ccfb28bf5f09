"""The manifest: which sources there are, where their files lie and how they are trained on.

A manifest is a YAML file::

    sources:
      - name: webfaq_kor
        files: webfaq_kor.parquet          # relative to the manifest; a list or a glob works too
        task_type: retrieval               # retrieval, clustering or classification
        symmetric: false                   # are query and passage of one kind?
        instruction: Given a question, retrieve passages that answer the question.
        languages: [kor]                   # ISO 639-3
        cap: 80000                         # rows at most, optional
        licence: CC-BY-4.0
        category: QA                       # the task as the data's paper names it; for reports
        stages: [stage1, stage2]           # stages that train on it; all if left out
        published_rows: 89271              # as its publication says; for the survey
        instruction_from: v1               # v1, mteb or written

Four keys may stand beside ``sources``: ``root`` (where the files lie: a folder relative to the manifest, or an address
such as ``hf://datasets/OWNER/NAME@REVISION``), ``stage_caps`` (rows of a source at most, by stage), ``stage_rows``
(rows under these caps, by stage, as the data's publication says; for plans made without the data) and
``published_shares`` (what the data's paper counts, see :class:`~training.data.manifest_file.PublishedShares`).

With ``each_file: true`` an entry is a collection: each of its files is a source of its own, named after the file, in
the language that the name tells. ``published_rows`` and ``published_files`` are then those of the whole collection;
``name_tells_language: false`` leaves every file the languages of the entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from training.common.errors import UserError
from training.common.file_names import languages_in_name
from training.common.paths import RULE
from training.data.manifest_file import TASK_TYPES, Entry, Manifest, check_name, read_manifest
from training.data.storage import SourceFile


@dataclass(frozen=True)
class Source:
    """One set of rows, trained on in batches of its own.

    Attributes:
        name: Unique name; the log and the prepared folder use it.
        files: Parquet files in the published format, in reading order.
        task_type: One of ``TASK_TYPES``.
        symmetric: Whether query and passage are of one kind, so that passages may carry the instruction too.
        instruction: What the query asks for.
        languages: ISO 639-3 codes.
        cap: Rows used at most; all if None.
        licence: SPDX identifier or a short text.
        category: The task as the paper of the data names it.
    """

    name: str
    files: list[SourceFile]
    task_type: str
    instruction: str
    symmetric: bool = False
    languages: list[str] = field(default_factory=list)
    cap: int | None = None
    licence: str | None = None
    category: str | None = None


def load_manifest(path: Path | str, data_dir: Path | str | None = None, stage: str | None = None) -> list[Source]:
    """Reads a manifest and finds the files of its sources.

    Args:
        path: The manifest.
        data_dir: Folder, or address such as ``hf://datasets/OWNER/NAME@REVISION``, to look for the files in, instead
            of the manifest's ``root`` or own folder.
        stage: Load the sources of this stage only, under its cap.

    Raises:
        UserError: If the manifest or a file is missing, a key is unknown, missing or of the wrong type, a task type is
            unknown, two sources have one name, no source names the stage, or a remote folder cannot be listed.
    """
    manifest = read_manifest(path, data_dir)
    sources: dict[str, Source] = {}
    for entry in manifest.of_stage(stage):
        for source in _sources(manifest, entry, stage):
            if source.name in sources:
                raise UserError(
                    f"{path}: two sources are named {source.name!r}, the second one in {entry.name!r}; "
                    "rename one of them or narrow its 'files'"
                )
            sources[source.name] = source
    return list(sources.values())


def _sources(manifest: Manifest, entry: Entry, stage: str | None) -> list[Source]:
    """The source of an entry or, of a collection, the sources."""
    files = find_entry_files(manifest, entry)
    for pattern, found in files.items():
        if not found:
            raise UserError(
                f"{manifest.path}: source {entry.name!r}: no file matches {manifest.folder.path(pattern)}; "
                f"download or build it, or correct 'files' ({RULE})"
            )
    each = list(dict.fromkeys(file for found in files.values() for file in found))
    shared = {
        "task_type": entry.task_type,
        "instruction": entry.instruction,
        "symmetric": entry.symmetric,
        "cap": manifest.cap_of(entry, stage),
        "licence": entry.licence,
        "category": entry.category,
    }
    if entry.each_file:
        for file in each:
            check_name(f"{manifest.path}: source {entry.name!r}", file.stem)
        return [Source(file.stem, [file], languages=file_languages(entry, file), **shared) for file in each]
    return [Source(entry.name, each, languages=entry.languages, **shared)]


def find_entry_files(manifest: Manifest, entry: Entry) -> dict[str, list[SourceFile]]:
    """The files of an entry by its patterns, none where there are none.

    Raises:
        UserError: If the data's folder is remote and cannot be listed.
    """
    return {pattern: manifest.folder.find(pattern) for pattern in entry.files}


def file_languages(entry: Entry, file: SourceFile) -> list[str]:
    """The languages of one file of a collection: those that its name tells, else all of the collection's."""
    told = languages_in_name(file.stem, entry.languages) if entry.name_tells_language else []
    return told or entry.languages


def require_local(sources: Sequence[Source]) -> None:
    """Refuses sources whose files are not on this machine, for work that reads them again and again.

    Raises:
        UserError: If a file is remote.
    """
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
    """Keeps the sources whose name fits one of the patterns (``*`` as in file names) and whose task type is listed.

    Raises:
        UserError: If a task type is unknown, a pattern fits no source, or nothing is left.
    """
    for task_type in task_types or []:
        if task_type not in TASK_TYPES:
            raise UserError(f"unknown task type {task_type!r}; use one of {', '.join(TASK_TYPES)}")
    for pattern in patterns or []:
        if not any(fnmatch(source.name, pattern) for source in sources):
            raise UserError(f"no source fits {pattern!r}; there are {', '.join(s.name for s in sources)}")
    selected = [
        source
        for source in sources
        if (not patterns or any(fnmatch(source.name, pattern) for pattern in patterns))
        and (not task_types or source.task_type in task_types)
    ]
    if not selected:
        raise UserError(f"no source is left of {len(sources)}: name more of them, or other task types")
    return selected
