"""The build file, which lists raw data sets with their format and columns, and building a source from each of them.

``training/data/building/README.md`` describes its keys.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from training.common.errors import UserError
from training.common.outputs import check_output, clear_partials, locked, scratch_folder, write_whole
from training.common.yaml_file import load_yaml, unknown_key
from training.data.building.examples import HELD_OUT_TEXT, RawRows, Row
from training.data.building.formats import FLAG, FORMATS, NUMBER, TEXT, Format, Key, is_filled, labelled
from training.data.building.held_out import (
    CANDIDATES,
    HELD_OUT,
    noted,
    query_forms,
    split_rows,
    write_labels,
    write_passages,
    write_queries,
)
from training.data.building.reader import RawData, load_raw
from training.data.manifest import MANIFEST, write_manifest
from training.data.preparation.plan import ON_BAD_ROW
from training.data.published import ROW_GROUP_ROWS, rows_table, write_parquet

logger = logging.getLogger(__name__)

REPORT = "build.json"
# Increase it when the same build file would build other rows than before.
_FORMAT = 2
# Arguments of load_dataset that have a key of their own or would change what it returns.
_NOT_OPTIONS = ("path", "name", "split", "revision", "data_files", "streaming")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_filled, value))


def _are_some_texts(value: Any) -> bool:
    return is_filled(value) or (_are_texts(value) and bool(value))


def _are_columns(value: Any) -> bool:
    # Beside a column of texts, one of ids or scores may be missing.
    return _are_some_texts([each for each in value if each is not None] if isinstance(value, list) else value)


def _is_name(value: Any) -> bool:
    return is_filled(value) and "/" not in value and not value.startswith(".")


def _are_options(value: Any) -> bool:
    return isinstance(value, dict) and not {*_NOT_OPTIONS} & {*value}


_SEED = Key("a whole number from 0", lambda value: type(value) is int and value >= 0, 0)
_SOURCES = Key("a list of at least one source", lambda value: isinstance(value, list) and bool(value))
# Of a source. A key is optional if it has a default.
_KEYS = {
    "name": Key("the name of a file, without '/' and a leading '.'", _is_name),
    "dataset": Key("a name on the Hub, a folder, or json, csv, parquet or text", is_filled),
    "config": TEXT._replace(default=None),
    "split": TEXT._replace(default="train"),
    "revision": TEXT._replace(default=None),
    "data_files": Key("a path or a list of paths", _are_some_texts, None),
    "load_options": Key(f"a mapping without {', '.join(_NOT_OPTIONS)}", _are_options, {}),
    "format": Key(f"one of {', '.join(FORMATS)}", lambda value: isinstance(value, str) and value in FORMATS),
    "columns": Key("a mapping", lambda value: isinstance(value, dict)),
    "instruction": TEXT._replace(default=None),
    "languages": Key("a list of codes (quote those that YAML takes for something else, such as 'no')", _are_texts, []),
    "licence": TEXT._replace(default=None),
    "cap": NUMBER._replace(default=None),
    "symmetric": FLAG._replace(default=None),
    "on_bad_row": Key(f"one of {', '.join(ON_BAD_ROW)}", lambda value: value in ON_BAD_ROW, "error"),
    "held_out_share": Key("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1, 0),
}
_COLUMN = Key("the name of a column", is_filled)
_COLUMNS = Key("the name of a column or a list of them", _are_columns)


@dataclass(frozen=True)
class RawSource:
    """One source to build."""

    name: str  # of the source and of its file
    where: str  # the build file and the source, for errors
    dataset: str
    load_options: dict[str, Any]  # arguments of datasets.load_dataset
    format: Format
    columns: dict[str, str | list[str]]  # by role
    options: dict[str, Any]  # values of the format's keys
    entry: dict[str, Any]  # in the manifest
    on_bad_row: str  # one of ON_BAD_ROW
    held_out_share: float = 0  # of the queries, for evaluation; with 1, no row is for training

    @property
    def lang(self) -> str | None:
        """The language of rows that name none: that of the source if it has only one."""
        return self.entry["languages"][0] if len(self.entry["languages"]) == 1 else None


def load_build_file(path: Path) -> tuple[int, list[RawSource]]:
    """Read a build file; return its seed and its sources in order."""
    return read_build(path, load_yaml(path))


def read_build(path: Path, content: Mapping[str, Any]) -> tuple[int, list[RawSource]]:
    """Check the content of a build file."""
    for key in content:
        if key not in ("seed", "sources"):
            raise unknown_key(str(path), key, ["seed", "sources"])
    seed, entries = _SEED.value(str(path), "seed", content), _SOURCES.value(str(path), "sources", content)
    sources: dict[str, RawSource] = {}
    for number, entry in enumerate(entries, start=1):
        source = _read_source(f"{path}: source", number, entry)
        if source.name in sources:
            raise UserError(f"{path}: two sources are named {source.name!r}; rename one of them")
        sources[source.name] = source
    return seed, list(sources.values())


def _read_source(where: str, number: int, entry: Any) -> RawSource:
    if not isinstance(entry, dict):
        raise UserError(f"{where} {number}: expected a mapping of keys to values, got {type(entry).__name__}")
    where = f"{where} {entry.get('name', number)!r}"
    kind = FORMATS[_KEYS["format"].value(where, "format", entry)]
    for key in entry:
        if key not in _KEYS and key not in kind.keys:
            raise unknown_key(where, key, [*_KEYS, *kind.keys])
    values = {name: key.value(where, name, entry) for name, key in _KEYS.items()}
    known, columns = (*kind.texts, *kind.values, *kind.optional, *kind.lists), values["columns"]
    for role in (*columns, *kind.texts, *kind.values):
        if role not in known:
            raise unknown_key(f"{where}: columns", role, known)
        (_COLUMNS if role in (*kind.texts, *kind.lists) else _COLUMN).value(f"{where}: columns", role, columns)
    if values["held_out_share"] and kind.held_out_by not in columns:
        raise UserError(f"{where}: key 'held_out_share' needs a format with queries; take it out")
    named = {"name": values["config"], **{key: values[key] for key in ("split", "revision", "data_files")}}
    entry_of = {"name": values["name"], "files": [f"{values['name']}.parquet"], "task_type": kind.task_type}
    entry_of |= {key: values[key] for key in ("instruction", "languages", "licence", "cap")}
    return RawSource(
        name=values["name"],
        where=where,
        dataset=values["dataset"],
        load_options={key: value for key, value in named.items() if value is not None} | values["load_options"],
        format=kind,
        columns=columns,
        options={name: key.value(where, name, entry) for name, key in kind.keys.items()},
        entry=entry_of | {"symmetric": kind.symmetric if values["symmetric"] is None else values["symmetric"]},
        on_bad_row=values["on_bad_row"],
        held_out_share=values["held_out_share"],
    )


def build_from_file(path: Path | str, output: Path | str) -> Path:
    """Build the sources that a build file lists, and return their manifest.

    Each source is one parquet file, complete or absent. A finished, unchanged source is kept; a changed one is replaced
    when all are built, and after an error it stays. The manifest is written last: if it is there, so are all its
    sources. ``build.json`` counts, by source, the raw rows read, the rows written and the rows dropped for each reason.
    """
    path, output = Path(path), Path(output)
    return build_sources(*load_build_file(path), path.parent, output, [path])


def build_sources(
    seed: int,
    sources: Sequence[RawSource],
    folder: Path,
    output: Path,
    reads: Sequence[Path] = (),
    held_out: frozenset[str] = frozenset(),
) -> Path:
    """Build sources, whose paths start at ``folder``, as :func:`build_from_file` does.

    No row has a query that is held out of any of them, nor one of ``held_out``, the :func:`held_out_forms` of others.
    """
    check_output(output, [*reads, *_raw_files(folder, sources)])
    with locked(output):
        report = _finished(output)
        names = {*report, *(source.name for source in sources)}
        files = [escape(name) for each in names for name in source_files(each)]
        check_output(output, ours=[MANIFEST, REPORT, ".*", *files])
        output.mkdir(exist_ok=True)
        # Marks the folder as a build from the start, so that a killed build can be continued.
        _write_report(output, report)
        clear_partials(output)
        replaced: dict[str, Any] = {}
        held_out |= held_out_forms(seed, sources, folder)
        with scratch_folder(output / "replaced") as aside:
            for source in sources:
                data = load_source(source, folder)
                fingerprint = _fingerprint(source, seed, data, held_out)
                built, there = report.get(source.name, {}), _sizes(output, source.name)
                if built.get("fingerprint") == fingerprint and there == built.get("bytes"):
                    logger.info("%s: kept, %d rows", source.name, built["rows"])
                    continue
                done, target = (replaced, aside) if there else (report, output)
                done[source.name] = {"fingerprint": fingerprint, **_build(source, seed, data, target, held_out)}
                _write_report(output, report)
            if replaced:
                # Killed from here on, neither manifest nor report describes a file of another build.
                (output / MANIFEST).unlink(missing_ok=True)
                _write_report(output, {name: built for name, built in report.items() if name not in replaced})
                for name in replaced:
                    for file in source_files(name):
                        (output / file).unlink(missing_ok=True)
                        if (aside / file).exists():
                            (aside / file).replace(output / file)
                _write_report(output, report | replaced)
            write_manifest(output / MANIFEST, [each.entry for each in sources if each.held_out_share < 1])
    return output / MANIFEST


def load_source(source: RawSource, folder: Path) -> RawData:
    """Find the raw rows of a source, whose paths start at ``folder``."""
    return load_raw(source.where, source.dataset, folder, **source.load_options)


def source_files(name: str) -> list[str]:
    """Return the names of a source's rows, of its held-out queries, and of the texts to find their passages among."""
    return [f"{name}{part}.parquet" for part in ("", HELD_OUT, CANDIDATES)]


def _sizes(folder: Path, name: str) -> dict[str, int]:
    """Return the bytes of the files of a source that exist."""
    return {file: (folder / file).stat().st_size for file in source_files(name) if (folder / file).is_file()}


def _raw_files(folder: Path, sources: list[RawSource]) -> Iterator[Path]:
    """Yield the raw data that is on this machine."""
    for source in sources:
        files = source.load_options.get("data_files") or []
        for pattern in (source.dataset, *([files] if isinstance(files, str) else files)):
            yield from map(Path, glob(str(folder / pattern), recursive=True))


def _write_report(output: Path, report: dict[str, Any]) -> None:
    content = {"sources": dict(sorted(report.items()))}
    write_whole(output / REPORT, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _finished(output: Path) -> dict[str, Any]:
    """Return the report on the finished sources; refuse a folder of anything but a build."""
    if not output.is_dir() or all(path.name.startswith(".") for path in output.iterdir()):
        return {}
    try:
        return dict(json.loads((output / REPORT).read_text(encoding="utf-8"))["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output}: holds something else than a build from raw data; give another folder") from None


class _Shape(NamedTuple):
    """What the columns of a source's file are."""

    positives: int = 0  # further passages
    negatives: int = 0
    more: Sequence[str] = ()


def held_out_forms(seed: int, sources: Sequence[RawSource], folder: Path) -> frozenset[str]:
    """Return the normal forms of the queries that are held out of sources."""
    forms: set[str] = set()
    for source in sources:
        asked = _split(source, seed, load_source(source, folder))[1] if source.held_out_share else None
        if asked is not None:
            forms |= query_forms(_raw_rows(source, seed, asked), source.format.held_out_by)
    return frozenset(forms)


def check_source(source: RawSource, seed: int, data: RawData, held_out: frozenset[str] = frozenset()) -> None:
    """Read every raw row of a source, and raise the error of the first faulty one; nothing is written."""
    train, asked = _split(source, seed, data)
    for part in (train, asked):
        raw = None if part is None else _raw_rows(source, seed, part, held_out if part is train else frozenset())
        rows = 0 if raw is None else sum(1 for _ in _rows(source, raw))
        if raw and not rows and (part is asked or source.held_out_share < 1):
            raise _no_row(source, data, raw.dropped)


def _build(
    source: RawSource, seed: int, data: RawData, folder: Path, held_out: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Write the files of a source and return what ``build.json`` says about it."""
    kind, trains = source.format, source.held_out_share < 1
    file, queries, candidates = (folder / name for name in source_files(source.name))
    train, apart = _split(source, seed, data)
    asked = None if apart is None else _raw_rows(source, seed, apart)
    raw = _raw_rows(source, seed, train, held_out)
    # Passages are found among all texts of a source; graded pairs are not searched.
    searched = asked is not None and not kind.more
    documents: dict[str, None] = dict.fromkeys(filter(None, data.documents())) if searched else {}

    def made() -> Iterator[Row]:
        return noted(_rows(source, raw), documents) if searched else _rows(source, raw)

    shape = _Shape(negatives=source.options.get("num_negatives", kind.num_negatives), more=kind.more)
    if kind.lists or not trains:
        shape = _shape(made())
    rows = write_parquet(file, _tables(source, shape, made())) if trains else 0
    dropped = {reason: count for reason, count in sorted(raw.dropped.items()) if count}
    if trains and not rows:
        raise _no_row(source, data, dropped)
    counts = {"read": data.num_rows, "rows": rows, "dropped": dropped}
    if asked is not None and kind.rows is labelled:
        counts["held_out"] = write_labels(queries, "query", asked)
        write_labels(candidates, "passage", raw)
    elif asked is not None:
        counts["held_out"] = write_queries(queries, noted(_rows(source, asked), documents))
        if searched:
            write_passages(candidates, documents)
    aside = f", {counts['held_out']} queries held out" if asked is not None else ""
    logger.info("%s: %d rows of %d read%s%s", source.name, rows, data.num_rows, aside, _reasons(dropped))
    return {"bytes": _sizes(folder, source.name), **counts}


def _reasons(dropped: Mapping[str, int]) -> str:
    return "".join(f"; dropped {count}: {reason}" for reason, count in sorted(dropped.items()) if count)


def _no_row(source: RawSource, data: RawData, dropped: Mapping[str, int]) -> UserError:
    remedy = "give other data" if dropped.get(HELD_OUT_TEXT) else "check 'columns' and the keys of the format"
    return UserError(f"{source.where}: no row is left of {data.num_rows}{_reasons(dropped)}; {remedy}")


def _split(source: RawSource, seed: int, data: RawData) -> tuple[RawData, RawData | None]:
    """Return the raw rows to train on, and those that are held out."""
    if not source.held_out_share:
        return data, None
    column = source.columns[source.format.held_out_by]
    # A text is found among others of its class.
    most = 0.5 if source.format.rows is labelled else 1
    return split_rows(data, column, source.held_out_share, most, seed, source.where)


def _raw_rows(source: RawSource, seed: int, data: RawData, held_out: Container[str] = frozenset()) -> RawRows:
    roles = {name: getattr(source.format, name) for name in ("texts", "values", "optional", "lists")}
    quarantine = source.on_bad_row == "quarantine"
    draws = {"name": source.name, "seed": seed}
    return RawRows(data, source.columns, source.where, **roles, **draws, held_out=held_out, quarantine=quarantine)


def _rows(source: RawSource, raw: RawRows) -> Iterator[Row]:
    return source.format.rows(raw, **source.options)


def _shape(rows: Iterator[Row]) -> _Shape:
    """Return the columns that hold rows of any number of passages and negatives."""
    positives = negatives = 0
    more: dict[str, None] = {}
    for row in rows:
        positives, negatives = max(positives, len(row.positives)), max(negatives, len(row.negatives))
        more |= dict.fromkeys(row.more)
    return _Shape(positives, negatives, sorted(more))


def _tables(source: RawSource, shape: _Shape, rows: Iterator[Row]) -> Iterator[pa.Table]:
    """Yield the rows as tables of one schema, to keep only one in memory."""
    while chunk := list(islice(rows, ROW_GROUP_ROWS)):
        negatives, positives = (
            list(zip(*([*texts, *[None] * (width - len(texts))] for texts in side), strict=True))
            for side, width in (
                ([row.negatives for row in chunk], shape.negatives),
                ([row.positives for row in chunk], shape.positives),
            )
        )
        more = {f"positive_{number}": column for number, column in enumerate(positives, start=2)}
        if source.lang or "lang" in source.columns:
            more["lang"] = [row.lang or source.lang for row in chunk]
        table = rows_table([row.query for row in chunk], [row.passage for row in chunk], negatives, **more)
        for name in shape.more:
            kind = pa.string() if name.endswith("_id") else pa.float64()
            table = table.append_column(name, pa.array([row.more.get(name) for row in chunk], kind))
        yield table


def _fingerprint(source: RawSource, seed: int, data: RawData, held_out: frozenset[str]) -> str:
    """Return a hash of everything that the rows depend on."""
    described = [source.name, source.format.rows.__name__, source.lang, source.columns, source.options]
    described = [_FORMAT, seed, *described, source.on_bad_row, source.held_out_share, data.fingerprint]
    described.append(hashlib.blake2b("\n".join(sorted(held_out)).encode(), digest_size=16).hexdigest())
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
