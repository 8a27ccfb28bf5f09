"""Builds training data in the published format from raw data: one file a source, a manifest and a report.

``python training/data/build.py build.yaml --output data/mine``; ``building/build_file.py`` describes the keys.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from glob import escape, glob
from itertools import chain, islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a script from a checkout: the recipe is not an installed package. The folder of this script goes, for its
    # modules shall be found as training.data's alone.
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent.parent), *(path for path in sys.path if path != str(_HERE))]

import datasets
import pyarrow as pa
import yaml

from training.common.command import run_command
from training.common.errors import UserError
from training.common.outputs import check_output, clear_partials, locked
from training.data.building.build_file import BuildFile, RawSource, load_build_file
from training.data.building.formats.format import Row
from training.data.building.json_rows import JsonRows
from training.data.building.loading import load_raw
from training.data.building.raw import RawRows
from training.data.parquet import ROW_GROUP_ROWS, rows_table, write_parquet

logger = logging.getLogger(__name__)

MANIFEST = "manifest.yaml"
REPORT = "build.json"
# What is to replace a source lies here until all sources are built.
_ASIDE = ".building"
# Raise it when the same build file would build other rows than before.
_FORMAT = 2


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    parser = argparse.ArgumentParser(
        prog="build.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="training/data/building/build_file.py describes the keys of a build file.",
        allow_abbrev=False,
    )
    parser.add_argument("build_file", metavar="BUILD.yaml", help="which raw data there are and of which kind")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to write; finished sources are kept")
    arguments = parser.parse_args(words)
    # The bars of `datasets` reading its files would outnumber our lines.
    datasets.disable_progress_bars()
    return run_command(lambda: _build(arguments))


def _build(arguments: argparse.Namespace) -> None:
    build_from_file(arguments.build_file, arguments.output)


def build_from_file(path: Path | str, output: Path | str) -> Path:
    """Builds what a build file lists, and returns the manifest.

    Each source is one parquet file, whole or absent. A source that is finished and unchanged is kept; one that changed
    is replaced when all sources are built. The manifest comes last: while there is one, all its sources are there.
    ``build.json`` tells, by source, how many raw rows were read, how many rows were written and what was dropped for
    which reason.

    Args:
        path: The build file.
        output: The folder to write; it is made if it is not there.

    Raises:
        UserError: If the build file or a source is faulty, or the folder holds something else. What was there before
            stays, and so do new sources built before the faulty one.
    """
    build_file, output = load_build_file(path), Path(output)
    check_output(output, _reads(build_file))
    with locked(output):
        return _build_sources(build_file, output)


def _build_sources(build_file: BuildFile, output: Path) -> Path:
    report = _start(output)
    sources = {*report, *(source.name for source in build_file.sources)}
    check_output(output, ours=[MANIFEST, REPORT, ".*", *(escape(f"{name}.parquet") for name in sources)])
    # Left by a command that was killed.
    clear_partials(output)
    aside = output / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    replaced: dict[str, Any] = {}
    for source in build_file.sources:
        _build_source(source, build_file, output, report, replaced)
    for name in replaced:
        (aside / f"{name}.parquet").replace(output / f"{name}.parquet")
    _write_report(output, report | replaced)
    _write_whole(output / MANIFEST, _manifest(build_file))
    shutil.rmtree(aside, ignore_errors=True)
    return output / MANIFEST


def _reads(build_file: BuildFile) -> list[Path]:
    """The build file and the raw data that is on this machine."""
    folder, reads = build_file.path.parent, [build_file.path]
    for source in build_file.sources:
        files = source.load_options.get("data_files") or []
        patterns = [source.dataset, *([files] if isinstance(files, str) else files)]
        reads += [Path(path) for pattern in patterns for path in glob(str(folder / pattern), recursive=True)]
    return reads


def _start(output: Path) -> dict[str, Any]:
    """Makes the folder and returns its report on sources so far.

    Raises:
        UserError: If the folder holds anything but a build.
    """
    if not output.is_dir() or all(path.name.startswith(".") for path in output.iterdir()):
        if output.exists() and not output.is_dir():
            raise UserError(f"{output}: is a file; give a folder for the output")
        output.mkdir(parents=True, exist_ok=True)
        # Says from the outset whose folder this is, so that a build that was killed can be gone on with.
        _write_report(output, {})
    try:
        report = dict(json.loads((output / REPORT).read_text(encoding="utf-8"))["sources"])
        if all(
            isinstance(built, dict) and {"fingerprint", "bytes", "rows"} <= built.keys() for built in report.values()
        ):
            return report
        raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{output}: holds something else than a build from raw data; give another folder") from None


def _build_source(
    source: RawSource, build_file: BuildFile, output: Path, report: dict[str, Any], replaced: dict[str, Any]
) -> None:
    """Builds one source unless it is there, and adds it to the report.

    Where another is in its place it is built aside, and added to ``replaced``.
    """
    dataset = load_raw(source.where, source.dataset, build_file.path.parent, **source.load_options)
    fingerprint = _fingerprint(source, build_file.seed, dataset)
    path, built = output / f"{source.name}.parquet", report.get(source.name, {})
    if built.get("fingerprint") == fingerprint and path.is_file() and path.stat().st_size == built.get("bytes"):
        logger.info("%s: kept, %d rows", source.name, built["rows"])
        return
    if path.exists():
        path = output / _ASIDE / path.name
        path.parent.mkdir(exist_ok=True)
    raw = RawRows(
        dataset,
        source.columns,
        source.where,
        texts=source.format.texts,
        values=source.format.values,
        optional=source.format.optional,
        name=source.name,
        seed=build_file.seed,
        quarantine=source.on_bad_row == "quarantine",
    )
    tables = _tables(source, source.format.rows(raw, **source.options))
    first = next(tables, None)
    if first is None:
        raise UserError(
            f"{source.where}: no row is left of {len(raw)}{_reasons(raw)}; check 'columns' and the keys of the format"
        )
    rows = write_parquet(path, chain([first], tables))
    entry = {
        "fingerprint": fingerprint,
        "bytes": path.stat().st_size,
        "read": len(raw),
        "rows": rows,
        "dropped": _dropped(raw),
    }
    if path.parent == output:
        report[source.name] = entry
        _write_report(output, report)
    else:
        replaced[source.name] = entry
    logger.info("%s: %d rows of %d read%s", source.name, rows, len(raw), _reasons(raw))


def _dropped(raw: RawRows) -> dict[str, int]:
    return {reason: count for reason, count in sorted(raw.dropped.items()) if count}


def _reasons(raw: RawRows) -> str:
    return "".join(f"; dropped {count}: {reason}" for reason, count in _dropped(raw).items())


def _fingerprint(source: RawSource, seed: int, dataset: datasets.Dataset | JsonRows) -> str:
    """Changes with anything that the rows depend on."""
    # Private, but what `datasets` itself caches by: of a local file its time, of a set on the Hub its revision.
    data = dataset.fingerprint if isinstance(dataset, JsonRows) else [dataset._fingerprint, len(dataset)]
    kind = source.format.rows.__name__
    described = [_FORMAT, seed, source.name, kind, source.lang, source.columns, source.options, source.on_bad_row, data]
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def _tables(source: RawSource, rows: Iterator[Row]) -> Iterator[pa.Table]:
    """The rows as tables of one schema, so that no more than one is in memory."""
    has_lang = source.lang is not None or "lang" in source.columns
    while chunk := list(islice(rows, ROW_GROUP_ROWS)):
        negatives = [
            [row.negatives[place] if place < len(row.negatives) else None for row in chunk]
            for place in range(source.num_negatives)
        ]
        more = {"lang": [row.lang or source.lang for row in chunk]} if has_lang else {}
        yield rows_table([row.query for row in chunk], [row.passage for row in chunk], negatives, **more)


def _manifest(build_file: BuildFile) -> str:
    entries = [
        {
            "name": source.name,
            # The manifest takes patterns.
            "files": escape(f"{source.name}.parquet"),
            "task_type": source.format.task_type,
            **{key: value for key, value in source.description.items() if value is not None},
        }
        for source in build_file.sources
    ]
    return yaml.safe_dump({"sources": entries}, sort_keys=False, default_flow_style=None, allow_unicode=True, width=119)


def _write_report(output: Path, report: dict[str, Any]) -> None:
    _write_whole(output / REPORT, json.dumps({"sources": report}, indent=2, ensure_ascii=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
