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
from training.common.outputs import check_output, locked, write_whole
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
    """Look for duplicates and evaluation texts, and write ``contamination.json`` and ``contamination.md``.

    Args:
        manifest: The sources.
        output: A folder for the reports and the cleaned files. Results in it are reused while nothing changed.
        duplicates: Which duplicates to look for; none if None.
        evaluation: Evaluation sets to look for.
        negatives: Whether to look for evaluation texts in the negatives, too.
        remove: Whether to write the sources without the rows found, and their ``manifest.yaml``.
        data_dir: Folder of the files, instead of the manifest's.
        executor: Where the work runs.

    Returns:
        The content of ``contamination.json``.
    """
    output, options = Path(output).resolve(), duplicates or DeduplicationOptions(exact=False)
    if not (options.exact or options.near or evaluation):
        raise UserError("nothing to look for; give --exact, --near, --evaluation or --mteb")
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
        removed = _to_remove(len(files), repeats, contamination) if remove else None
        if removed is not None:
            _write_clean(sources, removed, output, work, executor)
        report = _report(sources, rows, repeats, options.across, contamination, removed)
        write_whole(output / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_whole(output / TABLE, contamination_table(report))
    return report


# Removal


def _to_remove(files: int, repeats: Mapping[str, np.ndarray], contamination: Contamination | None) -> list[np.ndarray]:
    """Sorted rows to leave out of each file."""
    found = [[each["row"][each["file"] == file] for each in repeats.values()] for file in range(files)]
    if contamination is not None:
        for file, matches in enumerate(contamination.found):
            found[file].append(matches[:, 0])
    return [np.unique(np.concatenate(rows)) for rows in found]


def _write_clean(
    sources: Sequence[Source], removed: Sequence[np.ndarray], output: Path, work: Path, executor: Executor | None
) -> None:
    """Write ``<source>/<number>.parquet`` for every file, without the rows to remove, and ``manifest.yaml``.

    All columns, their types and the order of the rows stay; a file that loses nothing is copied byte for byte. A file
    that loses every row is not written, nor is a source without files.
    """
    files = [path for source in sources for path in source.files]
    digest = hashlib.blake2b(b"".join(len(rows).to_bytes(8, "little") + rows.tobytes() for rows in removed))
    folder = stage_folder(work, "clean", files, [digest.hexdigest(), [source.name for source in sources]])
    names = [Path(source.name, f"{number:05d}.parquet") for source in sources for number in range(len(source.files))]
    empty = [len(rows) == pq.read_metadata(path).num_rows for path, rows in zip(files, removed, strict=True)]
    moved = folder / "moved"
    if moved.exists():
        written = [nothing or (output / name).exists() for nothing, name in zip(empty, names, strict=True)]
        if all(written) and (output / MANIFEST).exists():
            return
        # The user deleted finished files, or the command was killed while it moved them.
        shutil.rmtree(folder / "tasks")
        moved.unlink()
    # In the work folder: earlier files in the output stay until there is something to replace them.
    new = folder / "files"
    for source in sources:
        (new / source.name).mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(removed):
        np.save(folder / f"removed_{number:05d}.npy", rows)
    clean = partial(_clean, tuple(files), tuple(new / name for name in names), folder)
    run_phases([Phase("clean", clean, len(files))], folder / "tasks", executor)
    left = {source.name: sorted(path.name for path in (new / source.name).iterdir()) for source in sources}
    entries = [
        {**asdict(source), "files": [f"{source.name}/{name}" for name in left[source.name]]}
        for source in sources
        if left[source.name]
    ]
    if not entries:
        raise UserError(f"{output}: no row of any source is left; look at {REPORT} before removing rows")
    moved.touch()
    for name, kept in left.items():
        shutil.rmtree(output / name, ignore_errors=True)
        if kept:
            (new / name).rename(output / name)
        else:
            logger.warning("source %s: every row was removed; the manifest leaves it out", name)
    write_manifest(output / MANIFEST, entries)


def _clean(files: Sequence[Path], targets: Sequence[Path], folder: Path, task: int) -> None:
    removed, path, target = np.load(folder / f"removed_{task:05d}.npy"), files[task], targets[task]
    if not len(removed):
        unfinished = target.with_name(f".{target.name}.partial")
        shutil.copyfile(path, unfinished)
        unfinished.replace(target)
    elif len(removed) < pq.read_metadata(path).num_rows:
        write_parquet(target, _kept(path, removed))


def _kept(path: Path, removed: np.ndarray) -> Iterator[pa.Table]:
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

    A row is counted once among the duplicates: as exact rather than near, and as inside its source rather than across.
    ``contaminated`` separates rows with a whole evaluation text (``whole``) from those that only share a run of tokens
    (``overlap``). Rows are numbered from 0 within their file.
    """
    files = [(source.name, path.name) for source in sources for path in source.files]
    sets: dict[str, dict[str, int]] = defaultdict(dict)
    if contamination is not None:
        for (name, column), texts in zip(contamination.columns, contamination.texts, strict=True):
            sets[name][column] = texts
    described = []
    for source in sources:
        own = [number for number, (name, _) in enumerate(files) if name == source.name]
        found = {kind: _duplicates(files, each[np.isin(each["file"], own)]) for kind, each in repeats.items()}
        nothing = {"inside": None, "across": None, "examples": []}
        exact, near = (found.get(kind, nothing) for kind in ("exact", "near"))
        contaminated, leaks = (None, []) if contamination is None else _contaminated(files, contamination, own)
        described.append(
            {
                "name": source.name,
                "rows": sum(rows[file] for file in own),
                "exact_duplicates": exact["inside"],
                "near_duplicates": near["inside"],
                "across_sources": {kind: each["across"] for kind, each in found.items()} if across and found else None,
                "contaminated": contaminated,
                "removed": None if removed is None else sum(len(removed[file]) for file in own),
                "examples": {
                    "exact_duplicates": exact["examples"],
                    "near_duplicates": near["examples"],
                    "contaminated": leaks,
                },
            }
        )
    return {"evaluation_sets": [{"name": name, "texts": texts} for name, texts in sets.items()], "sources": described}


def _duplicates(files: Sequence[tuple[str, str]], repeats: np.ndarray) -> dict[str, Any]:
    """Counts of a source's repeats inside it and by other source, and examples of both."""
    inside = repeats["inside"]
    others = Counter(files[file][0] for file in repeats["first_file"][~inside].tolist())
    chosen = np.sort(np.concatenate([np.flatnonzero(part)[:_EXAMPLES] for part in (inside, ~inside)]))
    examples = [
        {
            "file": files[file][1],
            "row": row,
            "repeats": {"source": files[first_file][0], "file": files[first_file][1], "row": first_row},
        }
        for file, row, first_file, first_row, _ in repeats[chosen].tolist()
    ]
    return {"inside": int(inside.sum()), "across": dict(sorted(others.items())), "examples": examples}


def _contaminated(
    files: Sequence[tuple[str, str]], contamination: Contamination, own: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counts of a source's rows, in all and by evaluation set and column, and examples."""
    # Whether a row has a whole text: of all sets under (), of a set, and of a set in a column of the rows.
    seen: dict[tuple[str, ...], dict[tuple[int, int], bool]] = defaultdict(dict)
    examples: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for file in own:
        for row, number, label, whole in contamination.found[file].tolist():
            name, evaluation_column = contamination.columns[label]
            column = ("query", "passage")[number] if number < 2 else f"negative_{number - 1}"
            for key in ((), (name,), (name, column)):
                seen[key][file, row] = seen[key].get((file, row), False) or bool(whole)
            if len(examples[bool(whole)]) < _EXAMPLES:
                example = {"file": files[file][1], "row": row, "column": column, "evaluation_set": name}
                example |= {"evaluation_column": evaluation_column, "kind": "whole" if whole else "overlap"}
                examples[bool(whole)].append(example)

    def counts(key: tuple[str, ...]) -> dict[str, int]:
        whole = sum(seen[key].values())
        return {"whole": whole, "overlap": len(seen[key]) - whole}

    sets = {
        name: {**counts((name,)), "columns": {key[1]: counts(key) for key in sorted(seen) if key[:-1] == (name,)}}
        for (name,) in sorted(key for key in seen if len(key) == 1)
    }
    return {"rows": len(seen[()]), **counts(()), "sets": sets}, examples[True] + examples[False]


def contamination_table(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown table for the dataset card; a dash means that it was not looked for."""
    head = ["source", "rows", "exact duplicates", "near duplicates", "in other sources"]
    head += ["evaluation texts", "13-gram overlaps", "removed"]
    rows = []
    for source in report["sources"]:
        across, contaminated = source["across_sources"], source["contaminated"] or {}
        rows.append(
            [
                source["rows"],
                source["exact_duplicates"],
                source["near_duplicates"],
                None if across is None else sum(count for kind in across.values() for count in kind.values()),
                contaminated.get("whole"),
                contaminated.get("overlap"),
                source["removed"],
            ]
        )
    looked_for = [[cell for cell in column if cell is not None] for column in zip(*rows, strict=True)]
    rows.append([sum(cells) if cells else None for cells in looked_for])
    names = [*(source["name"] for source in report["sources"]), "**all**"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, cells in zip(names, rows, strict=True):
        lines.append(f"| {name} | " + " | ".join("–" if cell is None else f"{cell:,}" for cell in cells) + " |")
    sets = [f"`{each['name']}` ({sum(each['texts'].values()):,} texts)" for each in report["evaluation_sets"]]
    if sets:
        lines.append(f"\nEvaluation sets: {', '.join(sets)}.")
    return "\n".join(lines) + "\n"
