"""The build file, which lists raw data sets with their format and columns, and building a source from each of them.

``training/data/building/README.md`` describes its keys.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape, glob
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from training.common.errors import UserError
from training.common.outputs import check_output, clear_partials, locked, write_whole
from training.common.yaml_file import load_yaml, unknown_key
from training.data.building.formats import FLAG, FORMATS, NUMBER, TEXT, Format, Key, Row, is_filled
from training.data.building.raw_rows import JsonRows, RawRows, load_raw
from training.data.manifest import MANIFEST, write_manifest
from training.data.preparation.plan import ON_BAD_ROW
from training.data.published import ROW_GROUP_ROWS, rows_table, write_parquet

logger = logging.getLogger(__name__)

REPORT = "build.json"
# Replaced sources are written here until all sources are built.
_ASIDE = ".building"
# Increase it when the same build file would build other rows than before.
_FORMAT = 2
# Arguments of load_dataset that have a key of their own or would change what it returns.
_NOT_OPTIONS = ("path", "name", "split", "revision", "data_files", "streaming")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_filled, value))


def _are_some_texts(value: Any) -> bool:
    return is_filled(value) or (_are_texts(value) and bool(value))


_TOP = {
    "seed": Key("a whole number from 0", lambda value: type(value) is int and value >= 0, 0),
    "sources": Key("a list of at least one source", lambda value: isinstance(value, list) and bool(value)),
}
# Of a source. A key is optional if it has a default.
_KEYS = {
    "name": TEXT,
    "dataset": Key("a name on the Hub, a folder, or json, csv, parquet or text", is_filled),
    "config": TEXT._replace(default=None),
    "split": TEXT._replace(default="train"),
    "revision": TEXT._replace(default=None),
    "data_files": Key("a path or a list of paths", _are_some_texts, None),
    "load_options": Key(
        f"a mapping without {', '.join(_NOT_OPTIONS)}",
        lambda value: isinstance(value, dict) and not {*_NOT_OPTIONS} & {*value},
        {},
    ),
    "format": Key(f"one of {', '.join(FORMATS)}", lambda value: isinstance(value, str) and value in FORMATS),
    "columns": Key("a mapping", lambda value: isinstance(value, dict)),
    "instruction": TEXT,
    "languages": Key("a list of codes (quote those that YAML takes for something else, such as 'no')", _are_texts, []),
    "licence": TEXT._replace(default=None),
    "cap": NUMBER._replace(default=None),
    "symmetric": FLAG._replace(default=None),
    "on_bad_row": Key(f"one of {', '.join(ON_BAD_ROW)}", lambda value: value in ON_BAD_ROW, "error"),
}
_COLUMN = Key("the name of a column", is_filled)
_COLUMNS = Key("the name of a column or a list of them", _are_some_texts)


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

    @property
    def lang(self) -> str | None:
        """The language of rows that name none: that of the source if it has only one."""
        return self.entry["languages"][0] if len(self.entry["languages"]) == 1 else None


def load_build_file(path: Path) -> tuple[int, list[RawSource]]:
    """Read a build file; return its seed and its sources in order."""
    content = load_yaml(path)
    for key in content:
        if key not in _TOP:
            raise unknown_key(str(path), key, list(_TOP))
    seed, entries = (key.value(str(path), name, content) for name, key in _TOP.items())
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
    if "/" in values["name"] or values["name"].startswith("."):
        raise UserError(f"{where}: the name becomes a file; leave out '/' and a leading '.'")
    if values["symmetric"] is None:
        values["symmetric"] = kind.symmetric
    known = (*kind.texts, *kind.values, *kind.optional)
    for role in (*values["columns"], *kind.texts, *kind.values):
        if role not in known:
            raise unknown_key(f"{where}: columns", role, known)
        column = _COLUMNS if role in kind.texts else _COLUMN
        column.value(f"{where}: columns", role, values["columns"])
    about = {key: values[key] for key in ("instruction", "languages", "licence", "cap", "symmetric")}
    named = {"name": values["config"], **{key: values[key] for key in ("split", "revision", "data_files")}}
    return RawSource(
        name=values["name"],
        where=where,
        dataset=values["dataset"],
        load_options={key: value for key, value in named.items() if value is not None} | values["load_options"],
        format=kind,
        columns=values["columns"],
        options={name: key.value(where, name, entry) for name, key in kind.keys.items()},
        entry={"name": values["name"], "files": [f"{values['name']}.parquet"], "task_type": kind.task_type, **about},
        on_bad_row=values["on_bad_row"],
    )


def build_from_file(path: Path | str, output: Path | str) -> Path:
    """Build the sources that a build file lists, and return their manifest.

    Each source is one parquet file, complete or absent. A finished, unchanged source is kept; a changed one is replaced
    when all sources are built. The manifest is written last: if it is there, so are all its sources. ``build.json``
    counts, by source, the raw rows read, the rows written and the rows dropped for each reason.

    Args:
        path: The build file.
        output: The folder to write. After an error its earlier contents stay, and so do the new sources built before.
    """
    path, output = Path(path), Path(output)
    seed, sources = load_build_file(path)
    check_output(output, [path, *_raw_files(path.parent, sources)])
    with locked(output):
        report = _finished(output)
        files = [escape(f"{name}.parquet") for name in {*report, *(source.name for source in sources)}]
        check_output(output, ours=[MANIFEST, REPORT, ".*", *files])
        output.mkdir(exist_ok=True)
        # Marks the folder as a build from the start, so that a killed build can be continued.
        _write_report(output, report)
        clear_partials(output)
        aside = output / _ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        replaced = {}
        for source in sources:
            dataset = load_raw(source.where, source.dataset, path.parent, **source.load_options)
            fingerprint = _fingerprint(source, seed, dataset)
            file, built = output / f"{source.name}.parquet", report.get(source.name, {})
            if built.get("fingerprint") == fingerprint and file.is_file() and file.stat().st_size == built.get("bytes"):
                logger.info("%s: kept, %d rows", source.name, built["rows"])
            elif file.exists():
                aside.mkdir(exist_ok=True)
                replaced[source.name] = {"fingerprint": fingerprint, **_build(source, seed, dataset, aside / file.name)}
            else:
                report[source.name] = {"fingerprint": fingerprint, **_build(source, seed, dataset, file)}
                _write_report(output, report)
        for name in replaced:
            (aside / f"{name}.parquet").replace(output / f"{name}.parquet")
        _write_report(output, report | replaced)
        write_manifest(output / MANIFEST, [source.entry for source in sources])
        shutil.rmtree(aside, ignore_errors=True)
    return output / MANIFEST


def _raw_files(folder: Path, sources: list[RawSource]) -> Iterator[Path]:
    """Yield the raw data that is on this machine."""
    for source in sources:
        files = source.load_options.get("data_files") or []
        for pattern in (source.dataset, *([files] if isinstance(files, str) else files)):
            yield from map(Path, glob(str(folder / pattern), recursive=True))


def _write_report(output: Path, report: dict[str, Any]) -> None:
    write_whole(output / REPORT, json.dumps({"sources": report}, indent=2, ensure_ascii=False) + "\n")


def _finished(output: Path) -> dict[str, Any]:
    """Return the report on the finished sources; refuse a folder of anything but a build."""
    if not output.is_dir() or all(path.name.startswith(".") for path in output.iterdir()):
        return {}
    try:
        return dict(json.loads((output / REPORT).read_text(encoding="utf-8"))["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output}: holds something else than a build from raw data; give another folder") from None


def _build(source: RawSource, seed: int, dataset: datasets.Dataset | JsonRows, file: Path) -> dict[str, Any]:
    """Write the file of a source and return what ``build.json`` says about it."""
    raw = RawRows(
        dataset,
        source.columns,
        source.where,
        texts=source.format.texts,
        values=source.format.values,
        optional=source.format.optional,
        name=source.name,
        seed=seed,
        quarantine=source.on_bad_row == "quarantine",
    )
    tables = _tables(source, source.format.rows(raw, **source.options))
    first = next(tables, None)
    rows = 0 if first is None else write_parquet(file, chain([first], tables))
    dropped = {reason: count for reason, count in sorted(raw.dropped.items()) if count}
    reasons = "".join(f"; dropped {count}: {reason}" for reason, count in dropped.items())
    if not rows:
        raise UserError(
            f"{source.where}: no row is left of {len(raw)}{reasons}; check 'columns' and the keys of the format"
        )
    logger.info("%s: %d rows of %d read%s", source.name, rows, len(raw), reasons)
    return {"bytes": file.stat().st_size, "read": len(raw), "rows": rows, "dropped": dropped}


def _tables(source: RawSource, rows: Iterator[Row]) -> Iterator[pa.Table]:
    """Yield the rows as tables of one schema, to keep only one in memory."""
    num_negatives = source.options.get("num_negatives", source.format.num_negatives)
    while chunk := list(islice(rows, ROW_GROUP_ROWS)):
        padded = [(*row.negatives, *[None] * (num_negatives - len(row.negatives))) for row in chunk]
        more = {}
        if source.lang is not None or "lang" in source.columns:
            more["lang"] = [row.lang or source.lang for row in chunk]
        yield rows_table(
            [row.query for row in chunk], [row.passage for row in chunk], list(zip(*padded, strict=True)), **more
        )


def _fingerprint(source: RawSource, seed: int, dataset: datasets.Dataset | JsonRows) -> str:
    """Return a hash of everything that the rows depend on."""
    # Private, but the key of the cache of `datasets`: depends on a file's time, or the revision of a set on the Hub.
    data = dataset.fingerprint if isinstance(dataset, JsonRows) else [dataset._fingerprint, len(dataset)]
    kind = source.format.rows.__name__
    described = [_FORMAT, seed, source.name, kind, source.lang, source.columns, source.options, source.on_bad_row, data]
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
