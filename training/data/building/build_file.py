"""The build file, which lists raw data sets with their format and columns, and building a source from each of them.

``training/data/building/README.md`` describes its keys.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from training.common.errors import UserError
from training.common.outputs import check_output, clear_partials, locked, scratch_folder, write_whole
from training.common.yaml_file import load_yaml, unknown_key
from training.data.building.formats import FLAG, FORMATS, NUMBER, TEXT, Format, Key, Row, is_filled
from training.data.building.reader import RawData, RawRows, load_raw
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
    known, columns = (*kind.texts, *kind.values, *kind.optional), values["columns"]
    for role in (*columns, *kind.texts, *kind.values):
        if role not in known:
            raise unknown_key(f"{where}: columns", role, known)
        (_COLUMNS if role in kind.texts else _COLUMN).value(f"{where}: columns", role, columns)
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
    )


def build_from_file(path: Path | str, output: Path | str) -> Path:
    """Build the sources that a build file lists, and return their manifest.

    Each source is one parquet file, complete or absent. A finished, unchanged source is kept; a changed one is replaced
    when all are built, and after an error it stays. The manifest is written last: if it is there, so are all its
    sources. ``build.json`` counts, by source, the raw rows read, the rows written and the rows dropped for each reason.
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
        replaced: dict[str, Any] = {}
        with scratch_folder(output / "replaced") as aside:
            for source in sources:
                data = load_raw(source.where, source.dataset, path.parent, **source.load_options)
                fingerprint = _fingerprint(source, seed, data)
                file, built = output / f"{source.name}.parquet", report.get(source.name, {})
                size = file.stat().st_size if file.is_file() else None
                if built.get("fingerprint") == fingerprint and size == built.get("bytes"):
                    logger.info("%s: kept, %d rows", source.name, built["rows"])
                    continue
                done, folder = (report, output) if size is None else (replaced, aside)
                done[source.name] = {"fingerprint": fingerprint, **_build(source, seed, data, folder / file.name)}
                _write_report(output, report)
            if replaced:
                # Killed from here on, neither manifest nor report describes a file of another build.
                (output / MANIFEST).unlink(missing_ok=True)
                _write_report(output, {name: built for name, built in report.items() if name not in replaced})
                for name in replaced:
                    (aside / f"{name}.parquet").replace(output / f"{name}.parquet")
                _write_report(output, report | replaced)
            write_manifest(output / MANIFEST, [source.entry for source in sources])
    return output / MANIFEST


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


def _build(source: RawSource, seed: int, data: RawData, file: Path) -> dict[str, Any]:
    """Write the file of a source and return what ``build.json`` says about it."""
    kind, quarantine = source.format, source.on_bad_row == "quarantine"
    roles = {"texts": kind.texts, "values": kind.values, "optional": kind.optional}
    raw = RawRows(data, source.columns, source.where, **roles, name=source.name, seed=seed, quarantine=quarantine)
    rows = write_parquet(file, _tables(source, kind.rows(raw, **source.options)))
    dropped = {reason: count for reason, count in sorted(raw.dropped.items()) if count}
    reasons = "".join(f"; dropped {count}: {reason}" for reason, count in dropped.items())
    if not rows:
        fault = f"no row is left of {data.num_rows}{reasons}; check 'columns' and the keys of the format"
        raise UserError(f"{source.where}: {fault}")
    logger.info("%s: %d rows of %d read%s", source.name, rows, data.num_rows, reasons)
    return {"bytes": file.stat().st_size, "read": data.num_rows, "rows": rows, "dropped": dropped}


def _tables(source: RawSource, rows: Iterator[Row]) -> Iterator[pa.Table]:
    """Yield the rows as tables of one schema, to keep only one in memory."""
    num_negatives = source.options.get("num_negatives", source.format.num_negatives)
    while chunk := list(islice(rows, ROW_GROUP_ROWS)):
        padded = [(*row.negatives, *[None] * (num_negatives - len(row.negatives))) for row in chunk]
        queries, passages, _, langs = zip(*chunk, strict=True)
        more = {"lang": [lang or source.lang for lang in langs]} if source.lang or "lang" in source.columns else {}
        yield rows_table(queries, passages, list(zip(*padded, strict=True)), **more)


def _fingerprint(source: RawSource, seed: int, data: RawData) -> str:
    """Return a hash of everything that the rows depend on."""
    described = [source.name, source.format.rows.__name__, source.lang, source.columns, source.options]
    described = [_FORMAT, seed, *described, source.on_bad_row, data.fingerprint]
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
