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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatch
from glob import glob
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.yaml_file import load_yaml, unknown_key

__all__ = ["TASK_TYPES", "Source", "load_manifest", "select_sources"]

# Retrieval trains with in-batch and hard negatives, the other two with hard negatives only.
TASK_TYPES = ("retrieval", "clustering", "classification")


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
    """

    name: str
    files: list[Path]
    task_type: str
    instruction: str
    symmetric: bool = False
    languages: list[str] = field(default_factory=list)
    cap: int | None = None
    licence: str | None = None


def load_manifest(path: Path | str) -> list[Source]:
    """Reads a manifest and finds the files of its sources.

    Raises:
        UserError: If the manifest or a file is missing, a key is unknown, missing or of the wrong type, a task type is
            unknown, or two sources have one name.
    """
    path = Path(path)
    content = load_yaml(path)
    for key in content:
        if key != "sources":
            raise unknown_key(str(path), key, ["sources"])
    entries = content.get("sources")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: key 'sources' must list at least one source")
    sources = [_read_source(path, number, entry) for number, entry in enumerate(entries, start=1)]
    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            raise UserError(f"{path}: two sources are named {source.name!r}; rename one of them")
        seen.add(source.name)
    return sources


def _read_source(path: Path, number: int, entry: Any) -> Source:
    where = f"{path}: source {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a mapping of keys to values, got {type(entry).__name__}")
    if isinstance(entry.get("name"), str):
        where = f"{path}: source {entry['name']!r}"
    known = {field.name: field for field in fields(Source)}
    for key in entry:
        if key not in known:
            raise unknown_key(where, key, list(known))
    for name, key in known.items():
        required = key.default is MISSING and key.default_factory is MISSING
        if required and not entry.get(name):
            raise UserError(f"{where}: key {name!r} is missing; add it")
    _check_types(where, entry)
    return Source(**{**entry, "files": _find_files(where, path.parent, entry["files"])})


def _check_types(where: str, entry: dict[str, Any]) -> None:
    expected = {
        "name": str,
        "files": (str, list),
        "task_type": str,
        "instruction": str,
        "symmetric": bool,
        "languages": list,
        "cap": int,
        "licence": str,
    }
    for key, value in entry.items():
        optional = key in ("cap", "licence") and value is None
        fits = isinstance(value, expected[key]) and not (key == "cap" and isinstance(value, bool))
        if isinstance(value, list):
            # YAML reads the language code `no` as false.
            fits = fits and all(isinstance(item, str) and item for item in value)
        if not optional and not fits:
            raise UserError(f"{where}: key {key!r} cannot be {value!r}; see the manifest format")
    if entry["task_type"] not in TASK_TYPES:
        raise UserError(f"{where}: unknown task_type {entry['task_type']!r}; use one of {', '.join(TASK_TYPES)}")
    if "/" in entry["name"] or entry["name"].startswith("."):
        raise UserError(f"{where}: the name becomes a folder; leave out '/' and a leading '.'")
    if entry.get("cap") is not None and entry["cap"] < 1:
        raise UserError(f"{where}: cap must be at least 1, got {entry['cap']}")


def _find_files(where: str, folder: Path, patterns: str | list[str]) -> list[Path]:
    """Files that fit the patterns, relative to ``folder``, each once and in the order of the patterns."""
    files: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = sorted(glob(pattern, root_dir=folder, recursive=True))
        found = [folder / path for path in matches if (folder / path).is_file()]
        if not found:
            raise UserError(f"{where}: no file matches {folder / pattern}; download or build it, or correct 'files'")
        files |= dict.fromkeys(found)
    return list(files)


def select_sources(
    sources: Sequence[Source], patterns: Sequence[str] | None = None, task_types: Sequence[str] | None = None
) -> list[Source]:
    """Keeps the sources whose name fits one of the patterns (``*`` as in file names) and whose task type is listed.

    Raises:
        UserError: If a task type is unknown, a pattern fits no source, or nothing is left.
    """
    for task_type in task_types or []:
        if task_type not in TASK_TYPES:
            raise UserError(f"unknown task type {task_type!r} in 'task_types'; use one of {', '.join(TASK_TYPES)}")
    for pattern in patterns or []:
        if not any(fnmatch(source.name, pattern) for source in sources):
            raise UserError(f"no source fits {pattern!r} in 'sources'; there are {', '.join(s.name for s in sources)}")
    selected = [
        source
        for source in sources
        if (not patterns or any(fnmatch(source.name, pattern) for pattern in patterns))
        and (not task_types or source.task_type in task_types)
    ]
    if not selected:
        raise UserError(f"no source is left of {len(sources)}: widen 'sources' or 'task_types'")
    return selected
