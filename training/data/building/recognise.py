"""Recognise a user's data: entries of a build for the files, folders and data sets that were named."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from itertools import islice, product
from pathlib import Path
from typing import Any

import fsspec

from training.common.errors import UserError, in_one_line
from training.common.hub import may_be_on_hub
from training.data.building.build_file import RawSource, read_build
from training.data.building.reader import RawData, is_beir, is_saved, load_raw, saved_splits
from training.data.manifest import MANIFEST

logger = logging.getLogger("training")

# Names of columns, as written in lower case with "_" between words. Of the first names that a file has, it must have
# one only; names of the second kind count where there is none of the first.
_QUERY = (
    ("query", "question", "anchor", "queries"),
    ("sentence1", "sentence_1", "sentence_a", "text1", "text_1", "text_a", "question1", "premise", "source", "title"),
)
_PASSAGE = (
    ("passage", "positive", "pos", "answer", "document", "positives", "positive_passages", "pos_doc", "passages"),
    (
        *("sentence2", "sentence_2", "sentence_b", "text2", "text_2", "text_b", "question2", "hypothesis", "target"),
        *("text", "body", "content", "context"),
    ),
)
_NEGATIVE = re.compile(r"(hard_)?(neg|negative)(s|_docs?|_passages?)?(_?\d+)?")
_FURTHER = re.compile(r"(positive|pos)_?\d+")
_TEXT, _LABEL = (
    ("text", "sentence", "utterance", "review", "content"),
    ("label", "class", "category", "intent", "labels"),
)
# What may grade a pair, or say that its passage is a wrong one.
_GRADE = ("label", "labels", "is_duplicate", "relevance", "relevant", "is_relevant", "is_correct")
_SCORE = ("score", "scores", "similarity", "similarity_score", "relatedness_score", "gold_score")
# The labels of SNLI and its followers, as numbers and as names.
_NLI = dict(enumerate(("entailment", "neutral", "contradiction")))
_NLI = {**_NLI, **{name: name for name in _NLI.values()}}
# As many as a clustering row is trained with: small classes have few more.
_CLASS_NEGATIVES = 9
_PROMPT, _LANG = ("prompt", "instruction"), ("lang",)
# How files are read, by suffix.
_KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"},
}
# How the Hub and others begin the names of the files, or folders, of a split.
_SPLIT = re.compile(r"(train|test|dev|val|valid|validation|eval)(?![^\W_])", re.IGNORECASE)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_ROLES = ("query", "passage", "negative", "score", "text", "label", "prompt", "lang")
_SHOWN_ROWS, _SHOWN_CHARACTERS = 3, 200
_SNIFFED = 1 << 16  # characters of a file's first line that are looked at


@dataclass(frozen=True)
class Recognised:
    """The format of some raw rows and their columns by role."""

    format: str
    columns: dict[str, Any]
    what: str  # the rows in words
    unused: tuple[str, ...]  # columns
    options: Mapping[str, Any] = field(default_factory=dict)  # keys of the format

    def line(self, name: str, rows: int) -> str:
        """Return what was recognised, in one line."""
        listed = {role: each if isinstance(each, list) else [each] for role, each in self.columns.items()}
        parts = [
            f"{role} from {_some(columns)}" for role, columns in listed.items() if not role.endswith(("_id", "_score"))
        ]
        unused = f"; not used: {_some(self.unused)}" if self.unused else ""
        return f"{name}: {rows:,} rows, read as {self.what}: {', '.join(parts)}{unused}"


def own_sources(names: Sequence[str], columns: Sequence[str] = (), **keys: Any) -> tuple[int, list[RawSource]]:
    """Return the seed and the sources of a build of what :func:`own_entries` finds."""
    seed, sources = read_build(Path("data"), {"sources": own_entries(names, columns, **keys)})
    files = [source.load_options.get("data_files", [source.dataset]) for source in sources]
    # As they are called, not as patterns.
    files = [[re.sub(r"\[(.)\]", r"\1", file) for file in own] for own in files]
    return seed, [replace(source, where=", ".join(own[:3])) for source, own in zip(sources, files, strict=True)]


def own_entries(names: Sequence[str], columns: Sequence[str] = (), **keys: Any) -> list[dict[str, Any]]:
    """Return entries of a build file for files, folders and data sets of the Hub, with ``keys`` in each of them.

    A name of the Hub is ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``; a folder may have ``::SPLIT``. ``columns``
    are words such as ``query=Frage`` for columns with other names.
    """
    named, entries = read_columns(columns), []
    for name in names:
        # Files with the same columns are one source.
        alike: dict[str, dict[str, Any]] = {}
        for entry in _find(name):
            where = entry.pop("where", f"{name}, split {entry['split']}")
            options = {"name": entry["config"]} if "config" in entry else {}
            options |= {key: entry[key] for key in ("split", "data_files") if key in entry}
            data = load_raw(where, entry["dataset"], Path(), **options, **entry.get("load_options", {}))
            found = recognise(where, data, named)
            logger.info("%s", found.line(where, data.num_rows))
            entry |= {"format": found.format, "columns": found.columns, **found.options}
            # Only files of JSON may differ in what else they hold.
            others = [] if entry["dataset"] == "json" else data.column_names
            same = alike.setdefault(json.dumps([{**entry, "data_files": None}, others]), entry)
            if same is not entry:
                same["data_files"] += entry["data_files"]
        for entry in alike.values():
            entries.append({"name": _free_name(name, entries), **entry, **keys})
    return entries


def _find(name: str) -> list[dict[str, Any]]:
    """Return the parts of an entry that say where the data is: one entry for each file of a folder of files."""
    base, _, split = name.partition("::")
    path = Path(base)
    if path.is_file():
        return [_file_entry(path)]
    if path.is_dir():
        if is_beir(path):
            known = sorted(each.stem for each in (path / "qrels").glob("*.tsv"))
            return [{"dataset": base, "split": split or next(iter({*known} & {"train"} or known), "train")}]
        if is_saved(path):
            known = saved_splits(path)
            return [{"dataset": base, "split": split or (known[0] if len(known) == 1 else "train")}]
        if (path / MANIFEST).exists():
            raise UserError(f"{path}: holds {MANIFEST}; give it as --manifest {path / MANIFEST}")
        files = [each for each in sorted(path.rglob("[!.]*")) if _kind(each) is not None and each.is_file()]
        if not files:
            raise UserError(f"{path}: holds no data file; files may end with {', '.join(_KINDS)}")
        return [_file_entry(each) for each in _of_split(path, files, split)]
    hub, _, rest = name.partition(":")
    if _kind(path) is not None or "://" in name or not may_be_on_hub(hub):
        raise UserError(f"{name}: no such file, folder or data set of the Hub; check the path")
    config, _, split = rest.partition(":")
    return [{"dataset": hub, "split": split or "train", **({"config": config} if config else {})}]


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Return the files of a split; without one, those for training and those whose names tell none."""
    parts = {file: map(_SPLIT.match, file.relative_to(folder).parts) for file in files}
    splits = {file: next((found[1].lower() for found in own if found), "") for file, own in parts.items()}
    wanted = {split} if split else {"train", ""} if "train" in splits.values() else {*splits.values()}
    kept = [file for file in files if splits[file] in wanted]
    if not kept:
        raise UserError(f"{folder}: no name of a file or folder in it begins with {split!r}; give another split")
    if len(kept) < len(files):
        more = ", ".join(sorted({*splits.values()} - wanted))
        logger.info("%s: files of other splits (%s) are not read; %s::SPLIT reads them", folder, more, folder)
    return kept


def _kind(path: Path) -> str | None:
    """Return how a file is read."""
    return _KINDS.get(Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower())


def _file_entry(path: Path) -> dict[str, Any]:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path}: cannot tell what it is; its name may end with {', '.join(_KINDS)}")
    entry = {"dataset": kind, "split": "train", "data_files": [escape(str(path))], "where": str(path)}
    if kind in ("json", "csv"):
        try:
            with fsspec.open(str(path), encoding="utf-8-sig", compression="infer", mode="rt") as file:
                start = file.readline(_SNIFFED)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except (OSError, EOFError, ValueError, ImportError) as error:
            raise UserError(f"{path}: cannot be read ({in_one_line(error)}); write it again") from None
        if "\0" in start:
            raise UserError(f"{path}: is no text file; give one that is, or correct its name")
        if not start.strip():
            raise UserError(f"{path}: is empty, or its first line is; give a file with rows")
    if kind == "csv":
        # Other languages' spreadsheets separate by semicolons; a quoted name may hold any of these.
        bare = re.sub(r'"[^"]*"', "", start)
        counts = {mark: bare.count(mark) for mark in ",;\t"}
        best = "\t" if path.name.lower().split(".")[-1] == "tsv" else max(counts, key=counts.__getitem__)
        entry |= {} if best == "," or not counts[best] else {"load_options": {"sep": best}}
    return entry


def _free_name(name: str, entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a name of a source that is also one of a file, and that no entry has."""
    stem = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow)?(\.\w+)?$", "", Path(name.split("::")[0]).name)
    stem = re.sub(r"[^\w-]+", "_", stem).strip("_") or "data"
    taken = {entry.get("name") for entry in entries}
    return next(each for each in (stem, *(f"{stem}_{n}" for n in range(2, len(entries) + 2))) if each not in taken)


def read_columns(words: Sequence[str]) -> dict[str, list[str]]:
    """Read ``role=column`` words; a role may be given several times."""
    named: dict[str, list[str]] = {}
    for word in words:
        role, equals, column = word.partition("=")
        if role not in _ROLES or not equals or not column:
            raise UserError(f"key 'columns': {word!r} is not ROLE=COLUMN; roles are {', '.join(_ROLES)}")
        named.setdefault(role, []).append(column)
    return named


def recognise(where: str, data: RawData, named: Mapping[str, Sequence[str]]) -> Recognised:
    """Find the format and the columns of raw rows: those that were named, then those with usual names."""
    names = _Names(where, data, named)
    query, passage = names.first("query", *_QUERY), names.first("passage", *_PASSAGE)
    label = names.first("label", _LABEL)
    text = names.first("text", *([name] for name in _TEXT)) if query is None or "text" in named else None
    if text is not None and label is not None and "passage" not in named:
        found = _recognised("labelled", {"text": text, "label": label}, "labelled texts", data)
        return replace(found, options={"num_negatives": _CLASS_NEGATIVES})
    if query is None or passage is None:
        raise _unrecognised(where, data, query, passage)
    if label is not None and query == names.free.get("premise"):
        columns = {"premise": query, "hypothesis": passage, "label": label}
        return replace(_recognised("nli", columns, "premises and hypotheses", data), options={"labels": _NLI})
    negatives = [*named.get("negative", []), *names.numbered(_NEGATIVE)]
    score = names.first("score", _SCORE)
    # A label of a pair of sentences says whether they mean the same.
    if score is None and passage != names.free.get("text") and query in map(names.free.get, _QUERY[1]):
        score = names.free.get("label", names.free.get("is_duplicate"))
    elif score is None and not negatives and not {"query", "passage"} <= {*named}:
        if (grade := next((names.free[name] for name in _GRADE if name in names.free), None)) is not None:
            what = f"{where}: column {grade!r} may grade {query!r} and {passage!r}, or be a class"
            remedy = f"query={query} passage={passage} to leave it out, or text={passage} label={grade}"
            raise UserError(f"{what}; give --columns score={grade} for graded pairs, {remedy} for labelled texts")
    if score is not None and not negatives:
        return _recognised("similarity", {"query": query, "passage": passage, "score": score}, "graded pairs", data)
    passages = [*named.get("passage", [passage]), *names.numbered(_FURTHER)]
    columns: dict[str, Any] = {"query": query, "passage": list(dict.fromkeys(passages))}
    columns |= {"negative": negatives} if negatives else {}
    for role, part in product(list(columns)[1:], ("id", "score")):
        beside = [names.beside(column, part) for column in columns[role]]
        if any(beside):
            columns[f"{role}_{part}"] = beside
    for role, usual in (("prompt", _PROMPT), ("lang", _LANG)):
        if (column := names.first(role, usual)) is not None:
            columns[role] = column
    what = "queries with passages and negatives" if negatives else "queries with passages"
    return _recognised("examples", columns, what, data)


class _Names:
    """The columns of some data: those that the user named, and the others by their names in one spelling."""

    def __init__(self, where: str, data: RawData, named: Mapping[str, Sequence[str]]) -> None:
        self._where, self._named = where, named
        self._there = {_usual(column): column for column in data.column_names}
        given = {column for columns in named.values() for column in columns}
        for column in given:
            if not {column, column.split(".")[0]} & {*data.column_names}:
                raise UserError(f"{where}: there is no column {column!r}; it has {', '.join(data.column_names)}")
        self._unnamed = [column for column in data.column_names if column not in given]
        # As a name of its own, a source is where a text comes from.
        if "target" not in self._there and (source := self._there.get("source")) in self._unnamed:
            self._unnamed.remove(source)
        self.free = {_usual(column): column for column in self._unnamed}

    def first(self, role: str, *tiers: Sequence[str]) -> str | None:
        """Return the column of a role: the one that was named, or the only one with a name of the first tier found."""
        if role in self._named:
            return self._named[role][0]
        for names in tiers:
            # Two names may differ in spelling only.
            found = [column for name in names for column in self._unnamed if _usual(column) == name]
            if len(found) > 1:
                what = f"columns {_some(found)} could each be the {role}"
                raise UserError(f"{self._where}: {what}; name one, for example: --columns {role}={found[0]}")
            if found:
                return found[0]
        return None

    def numbered(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the columns whose names fit a pattern, by their numbers."""
        found = [name for name in self.free if pattern.fullmatch(name)]
        return [self.free[name] for name in sorted(found, key=lambda name: int(re.sub(r"\D", "", name) or 0))]

    def beside(self, column: str, part: str) -> str | None:
        """Return the column of the ids or scores of another one, such as ``pos_scores`` of ``pos``."""
        name = _usual(column)
        names = (f"{name}_{part}", f"{name}_{part}s", f"{name.removesuffix('s')}_{part}s")
        return next((self._there[each] for each in names if each in self._there), None)


def _usual(column: str) -> str:
    return re.sub(r"\W+", "_", column.strip().lower())


def _recognised(kind: str, columns: dict[str, Any], what: str, data: RawData) -> Recognised:
    used = {each for column in columns.values() for each in (column if isinstance(column, list) else [column])}
    return Recognised(kind, columns, what, tuple(name for name in data.column_names if name not in used))


def _unrecognised(where: str, data: RawData, query: str | None, passage: str | None) -> UserError:
    """Return the error with the columns, some rows and the line to type."""
    rows = [row for _, row in islice(data.read(data.column_names), _SHOWN_ROWS)]
    shown = "".join(f"\n  {json.dumps(row, ensure_ascii=False, default=str)[:_SHOWN_CHARACTERS]}" for row in rows)
    free = [name for name in data.column_names if name not in (query, passage)]
    guess = [query or next(iter(free), "QUERY"), passage or next(iter(free[query is None :]), "PASSAGE")]
    missing = " and ".join(role for role, column in (("query", query), ("passage", passage)) if column is None)
    return UserError(
        f"{where}: no column is known to be the {missing}. Columns: {', '.join(data.column_names)}. Rows:{shown}\n"
        f"Name the columns, for example: --columns query={guess[0]} passage={guess[1]}"
    )


def _some(names: Iterable[str]) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names if len(names) < 8 else [*names[:6], f"{len(names) - 6} more"])
