"""Look for duplicates and evaluation texts in the sources of a manifest, report them, and remove them on request."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from training.common.errors import UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.outputs import check_output, locked, whole_file, write_whole
from training.data.cleaning.contamination import find_contamination
from training.data.cleaning.duplicates import DeduplicationOptions, find_duplicates
from training.data.cleaning.evaluation_texts import EvaluationFile, EvaluationSet
from training.data.manifest import MANIFEST, Source, load_manifest, read_manifest, require_local, write_manifest
from training.data.published import PublishedFile, write_parquet
from training.data.storage import stage_folder

logger = logging.getLogger(__name__)

REPORT, TABLE = "contamination.json", "contamination.md"
# Counts of rows in the report of a source, with their heads in the table. A row is counted once: as exact rather than
# near, as inside its source rather than across, as having a whole evaluation text rather than a run of one.
COUNTS = {
    "rows": "rows",
    "exact_duplicates": "exact duplicates",
    "near_duplicates": "near duplicates",
    "across_sources": "in other sources",
    "whole_texts": "evaluation texts",
    "overlaps": "13-gram overlaps",
    "removed": "removed",
}
_WORK = ".work"
# Examples of each kind in the report of a source.
_EXAMPLES = 10


def decontaminate(
    manifest: Path | str,
    output: Path | str,  # for the reports and the cleaned files; results in it are reused while nothing changed
    duplicates: DeduplicationOptions,
    evaluation: Sequence[EvaluationSet] = (),
    *,
    negatives: bool = False,  # look for evaluation texts in the negatives, too
    remove: bool = False,  # write the sources without the rows found, and their manifest.yaml
    data_dir: str | None = None,  # of the files, instead of the manifest's
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Look for duplicates and evaluation texts; write and return the report."""
    output = Path(output).resolve()
    if not (duplicates.exact or duplicates.near or evaluation):
        raise UserError("nothing to look for; give --exact, --near, --evaluation or --mteb")
    if not 0 < duplicates.similarity <= 1:
        raise UserError(f"--similarity must be over 0 and at most 1, got {duplicates.similarity}")
    if duplicates.across and not (duplicates.exact or duplicates.near):
        raise UserError("--across says where duplicates are looked for; give --exact or --near with it")
    sources = load_manifest(manifest, data_dir)
    require_local(sources)
    files = [path for source in sources for path in source.files]
    source_of = [number for number, source in enumerate(sources) for _ in source.files]
    held_out = [each.path for each in evaluation if isinstance(each, EvaluationFile)]
    check_output(output, [Path(manifest), *files, *held_out])
    with locked(output):
        work = output / _WORK
        ours = [REPORT, TABLE, MANIFEST, _WORK, *(escape(source.name) for source in sources)]
        # Without the work, a manifest or report was not written by this command.
        check_output(output, ours=ours if work.exists() else [])
        if (output / MANIFEST).exists() and not remove:
            raise UserError(f"{output}: the folder holds cleaned files; add --remove or give another --output")
        rows = [PublishedFile(path).num_rows for path in files]
        work.mkdir(parents=True, exist_ok=True)
        repeats = find_duplicates(files, source_of, duplicates, work, executor)
        sets, leaks = find_contamination(files, evaluation, work, negatives, executor) if evaluation else ({}, None)
        removed = None
        if remove:
            found = pd.concat([*repeats.values(), *([] if leaks is None else [leaks])])
            removed = [np.unique(found.loc[found["file"] == file, "row"]) for file in range(len(files))]
            entries = _write_clean(sources, rows, removed, output, executor)
            write_manifest(output / MANIFEST, entries, stage_caps=read_manifest(manifest).stage_caps)
        described = _report(sources, rows, repeats, duplicates.across, leaks, removed)
        report = {"evaluation_sets": sets, "sources": described}
        write_whole(output / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_whole(output / TABLE, _table(report))
    return report


# Removal


def _write_clean(
    sources: Sequence[Source], rows: list[int], removed: list[np.ndarray], output: Path, executor: Executor | None
) -> list[dict[str, Any]]:
    """Write ``<source>/<number>.parquet`` for every file with rows left, and return the entries of the manifest."""
    files = [path for source in sources for path in source.files]
    names = [f"{source.name}/{number:05d}.parquet" for source in sources for number in range(len(source.files))]
    kept = [name for name, count, gone in zip(names, rows, removed, strict=True) if len(gone) < count]
    if not kept:
        raise UserError(f"{output}: no row of any source is left; look at {REPORT} before removing rows")
    digests = [hashlib.blake2b(gone.tobytes()).hexdigest() for gone in removed]
    folder = stage_folder(output / _WORK, "clean", files, [digests, names])
    tasks, manifest = folder / "tasks", output / MANIFEST
    # Files were written for other data or settings, or deleted since.
    if not tasks.exists() or (manifest.exists() and not all((output / name).exists() for name in kept)):
        manifest.unlink(missing_ok=True)
        for path in (tasks, *(output / source.name for source in sources)):
            shutil.rmtree(path, ignore_errors=True)
    for number, gone in enumerate(removed):
        (output / names[number]).parent.mkdir(exist_ok=True)
        np.save(folder / f"removed_{number:05d}.npy", gone)
    clean = partial(_clean, tuple(files), tuple(output / name for name in names), folder)
    run_phases([Phase("clean", clean, len(files))], tasks, executor)
    entries = []
    for source in sources:
        own = [name for name in kept if name.startswith(f"{source.name}/")]
        if own:
            entries.append({**asdict(source), "files": own})
        else:
            logger.warning("source %s: every row was removed; the manifest leaves it out", source.name)
            shutil.rmtree(output / source.name)
    return entries


def _clean(files: Sequence[Path], targets: Sequence[Path], folder: Path, task: int) -> None:
    removed, path, target = np.load(folder / f"removed_{task:05d}.npy"), files[task], targets[task]
    # A file that loses nothing stays byte for byte; one that loses every row is not written.
    if not len(removed):
        with whole_file(target) as unfinished:
            shutil.copyfile(path, unfinished)
    elif len(removed) < pq.read_metadata(path).num_rows:
        write_parquet(target, _without(path, removed))


def _without(path: Path, removed: np.ndarray) -> Iterator[pa.Table]:
    row = 0
    for batch in PublishedFile(path).record_batches(all_columns=True):
        kept = ~np.isin(np.arange(row, row + len(batch)), removed, assume_unique=True)
        row += len(batch)
        yield pa.Table.from_batches([batch.filter(pa.array(kept))])


# Report


def _report(
    sources: Sequence[Source],
    rows: Sequence[int],
    repeats: Mapping[str, pd.DataFrame],
    across: bool,
    leaks: pd.DataFrame | None,
    removed: Sequence[np.ndarray] | None,
) -> list[dict[str, Any]]:
    """Return counts and examples of each source; None means that it was not looked for."""
    names = [f"{source.name}: {path.name}" for source in sources for path in source.files]
    described, end = [], 0
    for source in sources:
        start, end = end, end + len(source.files)
        counts: dict[str, Any] = {**dict.fromkeys(COUNTS), "rows": sum(rows[start:end])}
        examples: dict[str, pd.DataFrame] = {}
        for kind, found in repeats.items():
            own = found[found["file"].between(start, end - 1)]
            counts[f"{kind}_duplicates"] = int(own["inside"].sum())
            if across:
                counts["across_sources"] = (counts["across_sources"] or 0) + int((~own["inside"]).sum())
            examples[f"{kind}_duplicates"] = own
        if leaks is not None:
            own = leaks[leaks["file"].between(start, end - 1)].sort_values("whole", ascending=False, kind="stable")
            of_rows = own.groupby(["file", "row"])["whole"].any()
            counts["whole_texts"], counts["overlaps"] = int(of_rows.sum()), int((~of_rows).sum())
            by_set = own.drop_duplicates(["evaluation_set", "file", "row"])["evaluation_set"].value_counts()
            counts["by_evaluation_set"] = by_set.to_dict()
            examples["evaluation_texts"] = own
        if removed is not None:
            counts["removed"] = sum(map(len, removed[start:end]))
        shown: dict[str, list[dict[str, Any]]] = {}
        for kind, found in examples.items():
            shown[kind] = [
                {key: names[value] if key in ("file", "first_file") else value for key, value in example.items()}
                for example in found[:_EXAMPLES].to_dict("records")
            ]
        described.append({"name": source.name, **counts, "examples": shown})
    return described


def _table(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown table for the dataset card; a dash means that it was not looked for."""
    rows = [[source[count] for count in COUNTS] for source in report["sources"]]
    rows.append([None if None in column else sum(column) for column in zip(*rows, strict=True)])
    names = [*(source["name"] for source in report["sources"]), "**all**"]
    lines = ["| source | " + " | ".join(COUNTS.values()) + " |", "| --- |" + " ---: |" * len(COUNTS)]
    for name, cells in zip(names, rows, strict=True):
        lines.append(f"| {name} | " + " | ".join("–" if cell is None else f"{cell:,}" for cell in cells) + " |")
    sets = [f"`{name}` ({texts:,} texts)" for name, texts in report["evaluation_sets"].items()]
    return "\n".join(lines) + "\n" + (f"\nEvaluation sets: {', '.join(sets)}.\n" if sets else "")
