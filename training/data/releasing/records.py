"""What lies beside the data and belongs on its card: records of how it was built, and the contamination report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.data.releasing.files import ReleasedSource

_RECORDS = ("build.json", "mining.json")
_COUNTS = ("rows", "exact_duplicates", "near_duplicates", "removed")


def read_records(folder: Path) -> dict[str, Any]:
    """The records of builders and of mining in the folder of a manifest, by file name.

    Raises:
        UserError: If one of them cannot be read.
    """
    return {name: _read_json(folder / name) for name in _RECORDS if (folder / name).is_file()}


def read_contamination(path: Path) -> dict[str, Any]:
    """The report of a search for duplicates and evaluation texts.

    Raises:
        UserError: If it is missing or is no such report.
    """
    report = _read_json(path)
    try:
        for given in report["evaluation_sets"]:
            str(given["name"]), sum(given["texts"].values())
        for source in report["sources"]:
            str(source["name"]), [source[key] for key in _COUNTS], _across(source), _found(source, "whole")
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no contamination report ({error!r}); give the contamination.json of this data"
        ) from None
    return report


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); write it again or take it away") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}; write it again or take it away")
    return content


def contamination_facts(report: Mapping[str, Any], released: Sequence[ReleasedSource]) -> dict[str, Any]:
    """The report as the card shows it: rows of the table, evaluation sets, and sources that were not looked at.

    Raises:
        UserError: If the report is of other data than what is released.
    """
    by_name = {source["name"]: source for source in report["sources"]}
    rows, unchecked = [], []
    for each in released:
        found = by_name.get(each.source.name)
        if found is None:
            unchecked.append(each.source.name)
            continue
        # The rows released are those that were looked at, or what was left of them.
        if each.rows not in (found["rows"], found["rows"] - (found["removed"] or 0)):
            raise UserError(
                f"contamination report: source {each.source.name!r} had {found['rows']:,} rows, of which "
                f"{found['removed'] or 0:,} were removed, but {each.rows:,} are released; check this very data"
            )
        removed = found["removed"] if each.rows != found["rows"] else 0 if found["removed"] is not None else None
        counts = [found["exact_duplicates"], found["near_duplicates"], _across(found)]
        counts += [_found(found, "whole"), _found(found, "overlap"), removed]
        rows.append([each.source.name, found["rows"], *counts])
    if len(rows) > 1:
        rows.append(["all", *(_total(column) for column in list(zip(*rows, strict=True))[1:])])
    sets = [{"name": each["name"], "texts": sum(each["texts"].values())} for each in report["evaluation_sets"]]
    return {"rows": rows, "sets": sets, "unchecked": unchecked}


def _total(column: Sequence[int | None]) -> int | None:
    counts = [count for count in column if count is not None]
    return sum(counts) if counts else None


def _across(source: Mapping[str, Any]) -> int | None:
    across = source["across_sources"]
    return None if across is None else sum(count for kind in across.values() for count in kind.values())


def _found(source: Mapping[str, Any], kind: str) -> int | None:
    return None if source["contaminated"] is None else source["contaminated"][kind]


def provenance_rows(records: Mapping[str, Any], names: Sequence[str]) -> list[list[Any]]:
    """Source, step, rows read, rows dropped, and how, for every released source that a record tells of.

    Raises:
        UserError: If a record is not in the form that its builder writes.
    """
    rows = []
    for name in names:
        for file, record in records.items():
            try:
                row = _step(file, record, name)
            except (AttributeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}, beside the manifest, is no record of a builder ({error!r}); take it away"
                ) from None
            rows += [[name, *row]] if row else []
    return rows


def _step(file: str, record: Mapping[str, Any], name: str) -> list[Any] | None:
    if file == "build.json" and "options" in record:
        if name not in record["rows"]:
            return None
        options = {key: value for key, value in record["options"].items() if key not in ("format", "languages")}
        return ["built from CLDR", None, record["dropped"][name], _listed(options)]
    entry = record["sources"].get(name)
    if entry is None:
        return None
    if file == "build.json":
        why = _listed({reason: count for reason, count in entry["dropped"].items() if count})
        return ["built from raw data", entry["read"], entry["read"] - entry["rows"], why]
    options = {key: value for key, value in entry["options"].items() if not isinstance(value, bool)}
    # The path of a local model is nobody else's business.
    model = Path(entry["model"]).name if Path(entry["model"]).is_absolute() else entry["model"]
    revision = f" at {entry['revision']}" if entry["revision"] else ""
    how = f"{model}{revision}: {_listed(options)}"
    return ["negatives mined", entry["rows"], entry["dropped"], how]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
