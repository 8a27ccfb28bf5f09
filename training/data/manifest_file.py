"""What a manifest says, checked key by key; its files are looked for elsewhere."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.yaml_file import load_yaml, unknown_key
from training.data.storage import DataFolder

# Retrieval trains with in-batch and hard negatives, the other two with hard negatives only.
TASK_TYPES = ("retrieval", "clustering", "classification")
# The list published for F2LLM v1, the prompts that mteb evaluates the released models with, or neither.
INSTRUCTION_ORIGINS = ("v1", "mteb", "written")


@dataclass(frozen=True)
class Entry:
    """One entry of a manifest: a source, or a collection whose files are sources.

    Attributes:
        name: Unique name.
        files: Names or patterns of parquet files, relative to the folder of the data.
        task_type: One of ``TASK_TYPES``.
        instruction: What the query asks for.
        symmetric: Whether query and passage are of one kind, so that passages may carry the instruction too.
        languages: ISO 639-3 codes.
        cap: Rows used of a source at most; all if None.
        licence: SPDX identifier or a short text.
        category: The task as the paper of the data names it.
        stages: Names of the stages that train on it; empty for all.
        published_rows: Rows that its publication states.
        published_files: Files that its publication states.
        instruction_from: One of ``INSTRUCTION_ORIGINS``.
        each_file: Whether each file is a source of its own, named after the file.
        name_tells_language: Whether the name of such a file may tell its language.
    """

    name: str
    files: list[str]
    task_type: str
    instruction: str
    symmetric: bool = False
    languages: list[str] = field(default_factory=list)
    cap: int | None = None
    licence: str | None = None
    category: str | None = None
    stages: list[str] = field(default_factory=list)
    published_rows: int | None = None
    published_files: int | None = None
    instruction_from: str | None = None
    each_file: bool = False
    name_tells_language: bool = True


@dataclass(frozen=True)
class PublishedShares:
    """What the paper of the data counts.

    Attributes:
        total_rows: Rows in all.
        language_rows: Rows by ISO 639-3 code.
        category_percent: Percent of all rows by category.
    """

    total_rows: int
    language_rows: dict[str, int] = field(default_factory=dict)
    category_percent: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """A manifest as it is written.

    Attributes:
        path: Its file.
        folder: Where its data files lie.
        entries: Its sources and collections.
        stage_caps: Rows used of a source at most, by stage.
        published_shares: What the data's paper counts, if the manifest says so.
        stage_rows: Rows under the caps that the data's publication states, by stage.
    """

    path: Path
    folder: DataFolder
    entries: list[Entry]
    stage_caps: dict[str, int]
    published_shares: PublishedShares | None
    stage_rows: dict[str, int] = field(default_factory=dict)

    def of_stage(self, stage: str | None) -> list[Entry]:
        """The entries that a stage trains on; all for None.

        Raises:
            UserError: If no entry names the stage.
        """
        named = sorted({name for entry in self.entries for name in entry.stages})
        if stage is not None and stage not in named:
            raise UserError(f"{self.path}: no source names the stage {stage!r}; there are {', '.join(named) or 'none'}")
        return [entry for entry in self.entries if stage is None or not entry.stages or stage in entry.stages]

    def cap_of(self, entry: Entry, stage: str | None) -> int | None:
        """Rows used at most of each source of an entry in a stage."""
        caps = (entry.cap, self.stage_caps.get(stage) if stage is not None else None)
        return min((cap for cap in caps if cap is not None), default=None)


def read_manifest(path: Path | str, data_dir: Path | str | None = None) -> Manifest:
    """Reads a manifest without looking for its files.

    Args:
        path: The manifest.
        data_dir: Folder or address to look for the files in, instead of the manifest's ``root`` or own folder.

    Raises:
        UserError: If the manifest is missing, a key is unknown, missing or of the wrong type, a task type is unknown,
            or two entries have one name.
    """
    path = Path(path)
    content = load_yaml(path, named_in_file=True)
    top = ["sources", "root", "stage_caps", "stage_rows", "published_shares"]
    for key in content:
        if key not in top:
            raise unknown_key(str(path), key, top)
    written = content.get("sources")
    if not isinstance(written, list) or not written:
        raise UserError(f"{path}: key 'sources' must list at least one source")
    entries = [_entry(path, number, entry) for number, entry in enumerate(written, start=1)]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise UserError(f"{path}: two sources are named {entry.name!r}; rename one of them")
        seen.add(entry.name)
    folder = _folder(path, content.get("root"), data_dir)
    shares = _published_shares(path, content.get("published_shares"))
    caps, rows = (_by_stage(path, key, content.get(key), entries) for key in ("stage_caps", "stage_rows"))
    return Manifest(path, folder, entries, caps, shares, rows)


def _folder(path: Path, root: Any, data_dir: Path | str | None) -> DataFolder:
    if root is not None and (not isinstance(root, str) or not root):
        raise UserError(f"{path}: key 'root' cannot be {root!r}; give a folder or an address such as hf://datasets/…")
    if data_dir is not None:
        return DataFolder(data_dir)
    return DataFolder(root if root and "://" in root else path.parent / (root or ""))


def _by_stage(path: Path, key: str, numbers: Any, entries: list[Entry]) -> dict[str, int]:
    numbers = _counts(f"{path}: key {key!r}", numbers, (int,), least=1)
    stages = sorted({stage for entry in entries for stage in entry.stages})
    for stage in numbers:
        if stage not in stages:
            raise unknown_key(f"{path}: key {key!r}", stage, stages)
    return numbers


def _published_shares(path: Path, shares: Any) -> PublishedShares | None:
    if shares is None:
        return None
    where = f"{path}: key 'published_shares'"
    known = [field.name for field in fields(PublishedShares)]
    if not isinstance(shares, dict):
        raise UserError(f"{where} cannot be {shares!r}; give {', '.join(known)}")
    for key in shares:
        if key not in known:
            raise unknown_key(where, key, known)
    total = _counts(where, {"total_rows": shares.get("total_rows")}, (int,), least=1)
    languages = _counts(f"{where}: 'language_rows'", shares.get("language_rows"), (int,))
    return PublishedShares(
        total["total_rows"],
        languages,
        _counts(f"{where}: 'category_percent'", shares.get("category_percent"), (int, float)),
    )


def _counts(where: str, counts: Any, kinds: tuple[type, ...], least: int = 0) -> dict[str, Any]:
    """A mapping of names to numbers, empty if there is none."""
    if counts is None:
        return {}
    if not isinstance(counts, dict):
        raise UserError(f"{where} cannot be {counts!r}; give a mapping of names to numbers")
    for name, count in counts.items():
        # YAML reads the language code `no` as false.
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: {name!r} is no name; put it in quotes")
        if not isinstance(count, kinds) or isinstance(count, bool) or count < least:
            raise UserError(f"{where}: {name!r} cannot be {count!r}; give a number of at least {least}")
    return counts


def _entry(path: Path, number: int, entry: Any) -> Entry:
    where = f"{path}: source {number}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a mapping of keys to values, got {type(entry).__name__}")
    if isinstance(entry.get("name"), str):
        where = f"{path}: source {entry['name']!r}"
    known = {field.name: field for field in fields(Entry)}
    for key in entry:
        if key not in known:
            raise unknown_key(where, key, list(known))
    for name, key in known.items():
        required = key.default is MISSING and key.default_factory is MISSING
        if required and not entry.get(name):
            raise UserError(f"{where}: key {name!r} is missing; add it")
    _check_types(where, entry)
    _check_values(where, entry)
    files = entry["files"]
    return Entry(**{**entry, "files": [files] if isinstance(files, str) else files})


_KINDS = {
    "name": str,
    "files": (str, list),
    "task_type": str,
    "instruction": str,
    "symmetric": bool,
    "languages": list,
    "cap": int,
    "licence": str,
    "category": str,
    "stages": list,
    "published_rows": int,
    "published_files": int,
    "instruction_from": str,
    "each_file": bool,
    "name_tells_language": bool,
}
_COUNTS = ("cap", "published_rows", "published_files")
_OPTIONAL = (*_COUNTS, "licence", "category", "instruction_from")


def _check_types(where: str, entry: dict[str, Any]) -> None:
    for key, value in entry.items():
        fits = isinstance(value, _KINDS[key]) and not (key in _COUNTS and isinstance(value, bool))
        if isinstance(value, list):
            # YAML reads the language code `no` as false.
            fits = fits and all(isinstance(item, str) and item for item in value)
        if not fits and not (key in _OPTIONAL and value is None):
            raise UserError(f"{where}: key {key!r} cannot be {value!r}; see the manifest format")


def _check_values(where: str, entry: dict[str, Any]) -> None:
    if entry["task_type"] not in TASK_TYPES:
        raise UserError(f"{where}: unknown task_type {entry['task_type']!r}; use one of {', '.join(TASK_TYPES)}")
    check_name(where, entry["name"])
    for key in _COUNTS:
        if entry.get(key) is not None and entry[key] < 1:
            raise UserError(f"{where}: {key} must be at least 1, got {entry[key]}")
    origin = entry.get("instruction_from")
    if origin is not None and origin not in INSTRUCTION_ORIGINS:
        raise UserError(f"{where}: unknown instruction_from {origin!r}; use one of {', '.join(INSTRUCTION_ORIGINS)}")


def check_name(where: str, name: str) -> None:
    """Refuses a source's name that cannot be that of a folder.

    Raises:
        UserError: If the name has a slash or starts with a dot.
    """
    if "/" in name or name.startswith("."):
        raise UserError(f"{where}: the name {name!r} becomes a folder; leave out '/' and a leading '.'")
