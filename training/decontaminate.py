"""Look for duplicates and evaluation texts in the sources of a manifest, report them, and remove them on request.

python training/decontaminate.py --manifest data/mined/manifest.yaml --output data/clean --exact --near --remove
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.common.command import run_command
from training.common.executor import read_executor
from training.data.cleaning.decontamination import TABLE, decontaminate
from training.data.cleaning.duplicates import DeduplicationOptions
from training.data.cleaning.evaluation_texts import evaluation_file, evaluation_tasks


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    summary, _, example = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="decontaminate.py", description=summary, epilog=f"example: {example}", allow_abbrev=False
    )
    parser.add_argument("--manifest", type=Path, required=True, help="the sources")
    parser.add_argument("--data-dir", help="folder of the files, instead of the manifest's")
    parser.add_argument("--output", type=Path, required=True, help="folder for the reports and the cleaned files")
    parser.add_argument("--exact", action="store_true", help="find pairs that repeat in any spelling")
    parser.add_argument("--near", action="store_true", help="find pairs that nearly repeat (MinHash)")
    parser.add_argument(
        "--similarity", type=_share, default=DeduplicationOptions.similarity, help="threshold of --near, from 0 to 1"
    )
    parser.add_argument("--across", action="store_true", help="also compare different sources with one another")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="FILE:COLUMN,COLUMN",
        help="evaluation sets: parquet, jsonl, csv, tsv; or txt with one text per line, without columns",
    )
    parser.add_argument("--mteb", nargs="+", default=[], metavar="TASK", help="evaluation sets: mteb task names")
    parser.add_argument("--negatives", action="store_true", help="also look for evaluation texts in the negatives")
    parser.add_argument("--remove", action="store_true", help="write the sources without the rows found")
    parser.add_argument("--executor", default="local", help="local, ray, slurm or jobs, or a JSON object with 'name'")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not over 0 and at most 1")
    return value


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(words)

    def work() -> None:
        evaluation = [evaluation_file(argument) for argument in arguments.evaluation]
        evaluation += evaluation_tasks(arguments.mteb) if arguments.mteb else []
        decontaminate(
            arguments.manifest,
            arguments.output,
            DeduplicationOptions(arguments.exact, arguments.near, arguments.across, arguments.similarity),
            evaluation,
            negatives=arguments.negatives,
            remove=arguments.remove,
            data_dir=arguments.data_dir,
            executor=read_executor(arguments.executor),
        )
        sys.stdout.write((arguments.output / TABLE).read_text(encoding="utf-8"))

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main())
