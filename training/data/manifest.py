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

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from training.errors import UserError

__all__ = ["TASK_TYPES", "Source", "load_manifest", "load_yaml", "select_sources", "unknown_key"]

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


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        UserError: If the file is missing, is no YAML or holds something other than a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML ({problem}); correct that line") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def unknown_key(where: str, key: str, known: Sequence[str]) -> UserError:
    """The error for a key that nobody reads, with the nearest known one."""
    near = difflib.get_close_matches(str(key), known, n=1)
    listed = f"known keys are {', '.join(sorted(known))}" if len(known) < 20 else "--help lists the known ones"
    remedy = f"did you mean {near[0]!r}?" if near else listed
    return UserError(f"{where}: unknown key {key!r}; {remedy}")


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
        if not optional and (not isinstance(value, expected[key]) or (key == "cap" and isinstance(value, bool))):
            raise UserError(f"{where}: key {key!r} cannot be {value!r}; see the manifest format")
    if entry["task_type"] not in TASK_TYPES:
        raise UserError(f"{where}: unknown task_type {entry['task_type']!r}; use one of {', '.join(TASK_TYPES)}")
    if "/" in entry["name"] or entry["name"].startswith("."):
        raise UserError(f"{where}: the name becomes a folder; leave out '/' and a leading '.'")
    if entry.get("cap") is not None and entry["cap"] < 1:
        raise UserError(f"{where}: cap must be at least 1, got {entry['cap']}")


def _find_files(where: str, folder: Path, patterns: str | list[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        relative = Path(pattern)
        if relative.is_absolute():
            found = sorted(relative.parent.glob(relative.name))
        else:
            found = sorted(folder.glob(pattern))
        if not found:
            raise UserError(f"{where}: no file matches {folder / pattern}; download or build it, or correct 'files'")
        files += found
    return files


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
