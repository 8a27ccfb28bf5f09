"""Finds duplicates and evaluation texts in the sources of a manifest, reports them, and removes them on request."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from training.common.command import run_command
from training.common.errors import UserError
from training.common.executor import Executor, read_executor
from training.common.outputs import check_output, locked
from training.common.run_folder import write_whole
from training.data.cleaning.decontamination import Contamination, find_contamination
from training.data.cleaning.deduplication import DeduplicationOptions, Repeats, find_duplicates
from training.data.cleaning.evaluation_texts import EvaluationFile, EvaluationSet, evaluation_file, evaluation_tasks
from training.data.cleaning.near_duplicates import NearOptions
from training.data.cleaning.removal import MANIFEST, write_clean
from training.data.cleaning.report import Findings, contamination_report, contamination_table
from training.data.manifest import Source, load_manifest, require_local
from training.data.published import PublishedFile

REPORT, TABLE = "contamination.json", "contamination.md"
_WORK = ".work"


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
    """Looks for duplicates and evaluation texts, and writes ``contamination.json`` and ``contamination.md``.

    Args:
        manifest: The sources.
        output: A folder for the reports and, if ``remove``, the cleaned files with their ``manifest.yaml``. What is
            finished there and unchanged is used again.
        duplicates: Which duplicates to look for; none if None.
        evaluation: Evaluation sets to look for.
        negatives: Whether to look for evaluation texts among the negatives, too.
        remove: Whether to write the sources without the rows found.
        data_dir: Folder of the files, instead of the manifest's own.
        executor: Where the work runs; local processes if None.

    Returns:
        The report, as it is in ``contamination.json``.

    Raises:
        UserError: If there is nothing to look for, the manifest or a file is faulty, or the folder holds something
            else.
    """
    output = Path(output).resolve()
    options = duplicates or DeduplicationOptions(exact=False)
    if not (options.exact or options.near or evaluation):
        raise UserError("nothing to look for; give --exact, --near, --evaluation or --mteb")
    if options.across and not (options.exact or options.near):
        raise UserError("--across says where duplicates are looked for; give --exact or --near with it")
    sources = load_manifest(manifest, data_dir)
    require_local(sources)
    held_out = [given.path for given in evaluation if isinstance(given, EvaluationFile)]
    reads = [Path(manifest), *(path for source in sources for path in source.files), *held_out]
    check_output(output, reads)
    with locked(output):
        _check_output(output, sources, remove)
        return _decontaminate(sources, output, options, evaluation, negatives, remove, executor)


def _decontaminate(
    sources: Sequence[Source],
    output: Path,
    options: DeduplicationOptions,
    evaluation: Sequence[EvaluationSet],
    negatives: bool,
    remove: bool,
    executor: Executor | None,
) -> dict[str, Any]:
    files = [path for source in sources for path in source.files]
    source_of = [number for number, source in enumerate(sources) for _ in source.files]
    rows = [PublishedFile(path).num_rows for path in files]
    work = output / _WORK
    work.mkdir(parents=True, exist_ok=True)
    repeats = find_duplicates(files, source_of, options, work, executor)
    contamination = find_contamination(files, evaluation, work, negatives, executor) if evaluation else None
    removed = None
    if remove:
        removed = _to_remove(len(files), repeats, contamination)
        write_clean(sources, removed, output, work, executor)
    report = contamination_report(Findings(sources, rows, repeats, options.across, contamination, removed))
    write_whole(output / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_whole(output / TABLE, contamination_table(report))
    return report


def _check_output(output: Path, sources: Sequence[Source], remove: bool) -> None:
    """Refuses a folder in which something would be lost."""
    ours = [REPORT, TABLE, MANIFEST, _WORK, *(escape(source.name) for source in sources)]
    # Without it, a manifest or report is somebody else's.
    check_output(output, ours=ours if (output / _WORK).exists() else [])
    if (output / MANIFEST).exists() and not remove:
        raise UserError(f"{output}: the folder holds cleaned files; add --remove or give another --output")


def _to_remove(files: int, duplicates: Mapping[str, Repeats], contamination: Contamination | None) -> list[np.ndarray]:
    """The rows to leave out of each file, in order."""
    found = [[repeats.row[repeats.file == file] for repeats in duplicates.values()] for file in range(files)]
    if contamination is not None:
        for file, matches in enumerate(contamination.found):
            found[file].append(matches[:, 0])
    return [np.unique(np.concatenate(rows)).astype(np.int64) for rows in found]


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    arguments = _arguments(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    evaluation = [evaluation_file(argument) for argument in arguments.evaluation]
    evaluation += evaluation_tasks(arguments.mteb) if arguments.mteb else []
    near = NearOptions(similarity=arguments.similarity)
    decontaminate(
        arguments.manifest,
        arguments.output,
        DeduplicationOptions(arguments.exact, arguments.near, arguments.across, near),
        evaluation,
        negatives=arguments.negatives,
        remove=arguments.remove,
        data_dir=arguments.data_dir,
        executor=read_executor(arguments.executor),
    )
    sys.stdout.write((arguments.output / TABLE).read_text(encoding="utf-8"))


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="the sources")
    parser.add_argument("--data-dir", help="folder of the files, instead of the manifest's own")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the reports and the cleaned files")
    parser.add_argument("--exact", action="store_true", help="find pairs that repeat, whatever their form")
    parser.add_argument("--near", action="store_true", help="find pairs that nearly repeat (MinHash)")
    parser.add_argument("--similarity", type=_share, default=NearOptions.similarity, help="how nearly, from 0 to 1")
    parser.add_argument("--across", action="store_true", help="compare sources with one another, too")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="FILE:COLUMN,COLUMN",
        help="evaluation sets: parquet, jsonl, csv, tsv; or txt, a text a line, without columns",
    )
    parser.add_argument("--mteb", nargs="+", default=[], metavar="TASK", help="evaluation sets: mteb task names")
    parser.add_argument("--negatives", action="store_true", help="look for evaluation texts in the negatives, too")
    parser.add_argument("--remove", action="store_true", help="write the sources without the rows found")
    parser.add_argument("--executor", default="local", help="local, ray, slurm or jobs, or a JSON object with 'name'")
    return parser.parse_args(words)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and at most 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
