"""Look for duplicates and evaluation texts in the sources of a manifest, report them, and remove them on request.

python training/decontaminate.py --manifest data/mined/manifest.yaml --output data/clean --exact --near --remove
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from training.common.command import command_parser, run_command
from training.common.executor import read_executor
from training.data.cleaning.decontamination import TABLE, decontaminate
from training.data.cleaning.duplicates import DeduplicationOptions
from training.data.cleaning.evaluation_texts import evaluation_file, evaluation_tasks


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser("decontaminate.py", __doc__)
    add, similarity = parser.add_argument, DeduplicationOptions.similarity
    add("--manifest", type=Path, required=True, help="the sources")
    add("--data-dir", help="folder of the files, instead of the manifest's")
    add("--output", type=Path, required=True, help="folder for the reports and the cleaned files")
    add("--exact", action="store_true", help="find pairs that repeat in any spelling")
    add("--near", action="store_true", help="find pairs that nearly repeat (MinHash)")
    add("--similarity", type=float, default=similarity, help="threshold of --near, over 0 and at most 1")
    add("--across", action="store_true", help="also compare different sources with one another")
    kinds = "evaluation sets: parquet, jsonl, csv, tsv; or txt with one text per line, without columns"
    add("--evaluation", nargs="+", default=[], metavar="FILE:COLUMN,COLUMN", help=kinds)
    add("--mteb", nargs="+", default=[], metavar="TASK", help="evaluation sets: mteb task names")
    add("--negatives", action="store_true", help="also look for evaluation texts in the negatives")
    add("--remove", action="store_true", help="write the sources without the rows found")
    add("--executor", default="local", help="local, ray, slurm or jobs, or a JSON object with 'name'")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    evaluation = [evaluation_file(each) for each in given.pop("evaluation")]
    evaluation += evaluation_tasks(mteb) if (mteb := given.pop("mteb")) else []
    duplicates = DeduplicationOptions(**{each.name: given.pop(each.name) for each in fields(DeduplicationOptions)})
    decontaminate(
        **{**given, "executor": read_executor(given["executor"])}, duplicates=duplicates, evaluation=evaluation
    )
    sys.stdout.write((given["output"] / TABLE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main())
