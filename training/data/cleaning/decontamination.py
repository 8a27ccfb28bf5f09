"""Look for duplicates and evaluation texts in the sources of a manifest, report them, and remove them on request."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.common.errors import UserError
from training.common.executor import Executor, Phase, run_phases
from training.common.outputs import check_output, locked, whole_file, write_whole
from training.data.cleaning.contamination import Contamination, find_contamination
from training.data.cleaning.duplicates import DeduplicationOptions, find_duplicates
from training.data.cleaning.evaluation_texts import EvaluationFile, EvaluationSet
from training.data.manifest import MANIFEST, Source, load_manifest, require_local, write_manifest
from training.data.published import PublishedFile, write_parquet
from training.data.storage import stage_folder

logger = logging.getLogger(__name__)

REPORT, TABLE = "contamination.json", "contamination.md"
_WORK = ".work"
# Examples of each kind in the report of a source.
_EXAMPLES = 5


def decontaminate(
    manifest: Path | str,
    output: Path | str,
    duplicates: DeduplicationOptions | None = None,
    evaluation: Sequence[EvaluationSet] = (),
    *,
    negatives: bool = False,
    remove: bool = False,
    data_dir: str | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Look for duplicates and evaluation texts; write and return the report.

    Args:
        manifest: The sources.
        output: A folder for the reports and the cleaned files. Results in it are reused while nothing changed.
        duplicates: Which duplicates to look for; none if None.
        evaluation: Evaluation sets to look for.
        negatives: Whether to look for evaluation texts in the negatives, too.
        remove: Whether to write the sources without the rows found, and their ``manifest.yaml``.
        data_dir: Folder of the files, instead of the manifest's.
        executor: Where the work runs.
    """
    output, options = Path(output).resolve(), duplicates or DeduplicationOptions(exact=False)
    if not (options.exact or options.near or evaluation):
        raise UserError("nothing to look for; give --exact, --near, --evaluation or --mteb")
    if not 0 < options.similarity <= 1:
        raise UserError(f"--similarity must be over 0 and at most 1, got {options.similarity}")
    if options.across and not (options.exact or options.near):
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
        repeats = find_duplicates(files, source_of, options, work, executor)
        contamination = find_contamination(files, evaluation, work, negatives, executor) if evaluation else None
        removed = None
        if remove:
            found = [[each["row"][each["file"] == file] for each in repeats.values()] for file in range(len(files))]
            for file, matches in enumerate(contamination.found if contamination else []):
                found[file].append(matches[:, 0])
            removed = [np.unique(np.concatenate(each)) for each in found]
            _write_clean(sources, rows, removed, output, executor)
        report = _report(sources, rows, repeats, options.across, contamination, removed)
        write_whole(output / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_whole(output / TABLE, _table(report))
    return report


# Removal


def _write_clean(
    sources: Sequence[Source],
    rows: Sequence[int],
    removed: Sequence[np.ndarray],
    output: Path,
    executor: Executor | None,
) -> None:
    """Write ``<source>/<number>.parquet`` for every file, without the rows to remove, and ``manifest.yaml``.

    All columns, their types and the order of the rows stay; a file that loses nothing is copied byte for byte. A file
    that loses every row is not written, nor is a source without files.
    """
    files = [path for source in sources for path in source.files]
    names = [f"{source.name}/{number:05d}.parquet" for source in sources for number in range(len(source.files))]
    kept = [name for name, count, gone in zip(names, rows, removed, strict=True) if len(gone) < count]
    if not kept:
        raise UserError(f"{output}: no row of any source is left; look at {REPORT} before removing rows")
    digest = hashlib.blake2b(b"".join(len(gone).to_bytes(8, "little") + gone.tobytes() for gone in removed))
    folder = stage_folder(output / _WORK, "clean", files, [digest.hexdigest(), names])
    tasks, manifest = folder / "tasks", output / MANIFEST
    if manifest.exists():
        if tasks.exists() and all((output / name).exists() for name in kept):
            return
        # Files were written for other data or settings, or deleted since.
        manifest.unlink()
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
    write_manifest(manifest, entries)


def _clean(files: Sequence[Path], targets: Sequence[Path], folder: Path, task: int) -> None:
    removed, path, target = np.load(folder / f"removed_{task:05d}.npy"), files[task], targets[task]
    # Of a run that was killed, with other settings.
    target.unlink(missing_ok=True)
    if not len(removed):
        with whole_file(target) as unfinished:
            shutil.copyfile(path, unfinished)
    elif len(removed) < pq.read_metadata(path).num_rows:
        write_parquet(target, _without(path, removed))


def _without(path: Path, removed: np.ndarray) -> Iterator[pa.Table]:
    row = 0
    for batch in PublishedFile(path).record_batches(all_columns=True):
        stays = ~np.isin(np.arange(row, row + len(batch)), removed)
        row += len(batch)
        yield pa.Table.from_batches([batch.filter(pa.array(stays))])


# Report


def _report(
    sources: Sequence[Source],
    rows: Sequence[int],
    repeats: Mapping[str, np.ndarray],
    across: bool,
    contamination: Contamination | None,
    removed: Sequence[np.ndarray] | None,
) -> dict[str, Any]:
    """Return counts and examples by source; None means that it was not looked for.

    A row is counted once: as exact rather than near, as inside its source rather than across, as having a whole
    evaluation text (``whole``) rather than a run of one (``overlap``). Rows are numbered from 0 within their file.
    """
    files = [(source.name, path.name) for source in sources for path in source.files]
    described, end = [], 0
    for source in sources:
        start, end = end, end + len(source.files)
        found = {kind: _duplicates(files, each, range(start, end)) for kind, each in repeats.items()}
        inside, _, examples = zip(*(found.get(kind, (None, {}, [])) for kind in ("exact", "near")), strict=True)
        contaminated, leaks = None, []
        if contamination is not None:
            contaminated, leaks = _contaminated(files, contamination, range(start, end))
        described.append(
            {
                "name": source.name,
                "rows": sum(rows[start:end]),
                "exact_duplicates": inside[0],
                "near_duplicates": inside[1],
                "across_sources": {kind: each[1] for kind, each in found.items()} if across and found else None,
                "contaminated": contaminated,
                "removed": None if removed is None else sum(map(len, removed[start:end])),
                "examples": {"exact_duplicates": examples[0], "near_duplicates": examples[1], "contaminated": leaks},
            }
        )
    sets: dict[str, dict[str, int]] = defaultdict(dict)
    if contamination is not None:
        for name, column, texts in contamination.columns:
            sets[name][column] = texts
    return {"evaluation_sets": [{"name": name, "texts": texts} for name, texts in sets.items()], "sources": described}


def _duplicates(
    files: Sequence[tuple[str, str]], repeats: np.ndarray, own: range
) -> tuple[int, dict[str, int], list[dict[str, Any]]]:
    """The number of a source's repeats inside it, their numbers by other source, and examples of both."""
    repeats = repeats[np.isin(repeats["file"], own)]
    inside, across = repeats[repeats["inside"]], repeats[~repeats["inside"]]
    others = Counter(files[file][0] for file in across["first_file"].tolist())
    chosen = np.sort(np.concatenate([inside[:_EXAMPLES], across[:_EXAMPLES]]))
    examples = [
        {
            "file": files[file][1],
            "row": row,
            "repeats": {"source": files[first_file][0], "file": files[first_file][1], "row": first_row},
        }
        for file, row, first_file, first_row, _ in chosen.tolist()
    ]
    return len(inside), dict(sorted(others.items())), examples


def _contaminated(
    files: Sequence[tuple[str, str]], contamination: Contamination, own: range
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counts of a source's rows, in all and by evaluation set and column, and examples."""
    # Rows by kind: of all sets under (), of a set, and of a set in a column of the rows.
    rows: dict[tuple[str, ...], list[set[tuple[int, int]]]] = defaultdict(lambda: [set(), set()])
    examples: list[list[dict[str, Any]]] = [[], []]
    for file in own:
        for row, number, label, whole in contamination.found[file].tolist():
            name, evaluation_column, _ = contamination.columns[label]
            column = ("query", "passage")[number] if number < 2 else f"negative_{number - 1}"
            for key in ((), (name,), (name, column)):
                rows[key][whole].add((file, row))
            if len(examples[whole]) < _EXAMPLES:
                example = {"file": files[file][1], "row": row, "column": column, "evaluation_set": name}
                example |= {"evaluation_column": evaluation_column, "kind": "whole" if whole else "overlap"}
                examples[whole].append(example)

    def counts(key: tuple[str, ...]) -> dict[str, int]:
        overlap, whole = rows[key]
        return {"whole": len(whole), "overlap": len(overlap - whole)}

    sets = {
        name: {**counts((name,)), "columns": {key[1]: counts(key) for key in sorted(rows) if key[:-1] == (name,)}}
        for (name,) in sorted(key for key in rows if len(key) == 1)
    }
    total = counts(())
    return {"rows": sum(total.values()), **total, "sets": sets}, examples[True] + examples[False]


def _table(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown table for the dataset card; a dash means that it was not looked for."""
    head = ["source", "rows", "exact duplicates", "near duplicates", "in other sources"]
    head += ["evaluation texts", "13-gram overlaps", "removed"]
    rows = []
    for source in report["sources"]:
        across, contaminated = source["across_sources"], source["contaminated"] or {}
        others = None if across is None else sum(sum(kind.values()) for kind in across.values())
        row = [source["rows"], source["exact_duplicates"], source["near_duplicates"], others]
        rows.append([*row, contaminated.get("whole"), contaminated.get("overlap"), source["removed"]])
    rows.append([None if None in column else sum(column) for column in zip(*rows, strict=True)])
    names = [*(source["name"] for source in report["sources"]), "**all**"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, cells in zip(names, rows, strict=True):
        lines.append(f"| {name} | " + " | ".join("–" if cell is None else f"{cell:,}" for cell in cells) + " |")
    sets = [f"`{each['name']}` ({sum(each['texts'].values()):,} texts)" for each in report["evaluation_sets"]]
    return "\n".join(lines) + "\n" + (f"\nEvaluation sets: {', '.join(sets)}.\n" if sets else "")
