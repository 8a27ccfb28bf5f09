"""The build file: which raw data there are, of which kind, and what becomes of their columns.

A build file is a YAML file::

    seed: 0                              # of every draw, optional
    sources:
      - name: snli
        dataset: stanfordnlp/snli        # what datasets.load_dataset takes: a name on the Hub, a folder, or
                                         # json, csv, parquet, text with `data_files: raw/*.jsonl`
        config: plain_text               # optional, as are split (train), revision, data_files
        load_options: {}                 # further arguments of datasets.load_dataset, such as {sep: ;} of csv
        format: nli                      # one of training.data.building.formats.FORMATS
        columns: {premise: premise, hypothesis: hypothesis, label: label}
        labels: {0: entailment, 1: neutral, 2: contradiction}       # a key of this format
        instruction: Given a premise, retrieve hypotheses that are entailed by the premise.
        languages: [eng]                 # these and the following go into the manifest; all optional
        licence: CC-BY-SA-4.0
        cap: 80000
        symmetric: false
        on_bad_row: error                # or quarantine: rows with something else than text where text belongs are
                                         # left out and counted in build.json, optional

Paths are relative to the build file. A column may be a path into nested ones (``answers.text``; of a list its first
item) or, for texts, a list of columns to be joined by newlines (``[title, body]``).

The formats, with the columns they read (``lang``, the language of a row, is optional throughout, as is ``passage_lang``
where there is a query) and the keys of their own (with the defaults):

===================  ==========================  ==============================================
``pairs``            query, passage              both_directions (false)
``summaries``        summary, article
``nli``              premise, hypothesis, label  labels (by their names), num_negatives (24)
``sts``              query, passage, score       threshold (4), scale ([0, 5])
``duplicates``       query, passage, [label]     duplicate_label (1), both_directions (false)
``duplicate_groups`` group                       both_directions (false)
``labelled``         text, label                 num_negatives (24)
``two_way``          text, label                 label_texts
===================  ==========================  ==============================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.yaml_file import load_yaml, unknown_key
from training.data.building.formats import FORMATS
from training.data.building.formats.format import REQUIRED, Format, Key
from training.data.options import ON_BAD_ROW

# Arguments of load_dataset with a key of their own, or that would change what it returns.
_NOT_OPTIONS = ("path", "name", "split", "revision", "data_files", "streaming")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_optional_text(value: Any) -> bool:
    return value is None or _is_text(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value)) and not {*_NOT_OPTIONS} & {*value}


_OPTIONAL_TEXT = Key("a text", _is_optional_text, None)
_KEYS = {
    "name": Key("a text", _is_text),
    "dataset": Key("a name on the Hub, a folder, or json, csv, parquet or text", _is_text),
    "config": _OPTIONAL_TEXT,
    "split": Key("a text", _is_text, "train"),
    "revision": _OPTIONAL_TEXT,
    "data_files": Key("a path or a list of paths", lambda v: v is None or _is_text(v) or (_are_texts(v) and v), None),
    "load_options": Key(f"a mapping without {', '.join(_NOT_OPTIONS)}", _are_options, {}),
    "format": Key(f"one of {', '.join(FORMATS)}", lambda value: isinstance(value, str) and value in FORMATS),
    "columns": Key("a mapping", lambda value: isinstance(value, dict)),
    "instruction": Key("a text", _is_text),
    "languages": Key("a list of codes (quote those that YAML takes for something else, such as 'no')", _are_texts, []),
    "licence": _OPTIONAL_TEXT,
    "cap": Key("a number of at least 1", lambda v: v is None or (_is_whole(v) and v >= 1), None),
    "symmetric": Key("true or false", lambda value: value is None or isinstance(value, bool), None),
    "on_bad_row": Key(f"one of {', '.join(ON_BAD_ROW)}", lambda value: value in ON_BAD_ROW, "error"),
}
# What the manifest says beside the rows: a change of it is none of them.
_DESCRIPTION = ("instruction", "languages", "licence", "cap", "symmetric")


@dataclass(frozen=True)
class RawSource:
    """One source to build.

    Attributes:
        name: The name of the source and of its file.
        where: What an error names: the build file and the source.
        dataset: What to load.
        load_options: Arguments of ``datasets.load_dataset``.
        format: The kind of its rows.
        columns: The column or columns of each role.
        options: The values of the format's own keys.
        description: What the manifest says of it, besides name, files and task type.
        on_bad_row: One of ``ON_BAD_ROW``.
    """

    name: str
    where: str
    dataset: str
    load_options: dict[str, Any]
    format: Format
    columns: dict[str, str | list[str]]
    options: dict[str, Any]
    description: dict[str, Any]
    on_bad_row: str = "error"

    @property
    def num_negatives(self) -> int:
        """Negative columns of its file."""
        return self.options.get("num_negatives", self.format.num_negatives)

    @property
    def lang(self) -> str | None:
        """The language of rows that name none: that of the source if it has but one."""
        return self.description["languages"][0] if len(self.description["languages"]) == 1 else None


@dataclass(frozen=True)
class BuildFile:
    """A build file.

    Attributes:
        path: Where it lies.
        seed: The seed of every draw.
        sources: What to build, in order.
    """

    path: Path
    seed: int
    sources: list[RawSource]


def load_build_file(path: Path | str) -> BuildFile:
    """Reads a build file.

    Raises:
        UserError: If it is missing, or a key is unknown, missing or of the wrong type.
    """
    path = Path(path)
    content = load_yaml(path)
    for key in content:
        if key not in ("seed", "sources"):
            raise unknown_key(str(path), key, ["seed", "sources"])
    seed, entries = content.get("seed", 0), content.get("sources")
    if not _is_whole(seed) or seed < 0:
        raise UserError(f"{path}: key 'seed' cannot be {seed!r}; give a whole number from 0")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: key 'sources' must list at least one source")
    sources = [_read_source(f"{path}: source", number, entry) for number, entry in enumerate(entries, start=1)]
    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            raise UserError(f"{path}: two sources are named {source.name!r}; rename one of them")
        seen.add(source.name)
    return BuildFile(path, seed, sources)


def _read_source(where: str, number: int, entry: Any) -> RawSource:
    if not isinstance(entry, dict):
        raise UserError(f"{where} {number}: expected a mapping of keys to values, got {type(entry).__name__}")
    where = f"{where} {entry['name']!r}" if isinstance(entry.get("name"), str) else f"{where} {number}"
    _value(where, entry, "format", _KEYS["format"])
    kind = FORMATS[entry["format"]]
    for key in entry:
        if key not in _KEYS and key not in kind.keys:
            raise unknown_key(where, key, [*_KEYS, *kind.keys])
    values = {name: _value(where, entry, name, key) for name, key in _KEYS.items()}
    if "/" in values["name"] or values["name"].startswith("."):
        raise UserError(f"{where}: the name becomes a file; leave out '/' and a leading '.'")
    if values["symmetric"] is None:
        values["symmetric"] = kind.symmetric
    named = {"name": values["config"], **{key: values[key] for key in ("split", "revision", "data_files")}}
    return RawSource(
        name=values["name"],
        where=where,
        dataset=values["dataset"],
        load_options={key: value for key, value in named.items() if value is not None} | values["load_options"],
        format=kind,
        columns=_columns(where, values["columns"], kind),
        options={name: _value(where, entry, name, key) for name, key in kind.keys.items()},
        description={key: values[key] for key in _DESCRIPTION},
        on_bad_row=values["on_bad_row"],
    )


def _value(where: str, entry: Mapping[str, Any], name: str, key: Key) -> Any:
    """The value of a key, or its default."""
    value = entry.get(name, key.default)
    if value is REQUIRED:
        raise UserError(f"{where}: key {name!r} is missing; give {key.expected}")
    if not key.fits(value):
        raise UserError(f"{where}: key {name!r} cannot be {value!r}; give {key.expected}")
    return value


def _columns(where: str, columns: Mapping[str, Any], kind: Format) -> dict[str, Any]:
    required = (*kind.texts, *kind.values)
    for role, column in columns.items():
        if role not in (*required, *kind.optional):
            raise unknown_key(f"{where}: columns", role, [*required, *kind.optional])
        joined = role in kind.texts and _are_texts(column) and column
        if not _is_text(column) and not joined:
            expected = "the name of a column or a list of them" if role in kind.texts else "the name of a column"
            raise UserError(f"{where}: columns: {role!r} cannot be {column!r}; give {expected}")
    for role in required:
        if role not in columns:
            raise UserError(f"{where}: columns: {role!r} is missing; give the name of the data's column for it")
    return dict(columns)
