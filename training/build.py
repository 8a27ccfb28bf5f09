"""Build training data in the published format from raw data, or show what a manifest would read.

``python training/build.py build.yaml --output data/mine`` writes one parquet file per source, a manifest and a report.
``python training/build.py --survey data/mine/manifest.yaml`` reads file metadata only and prints tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The recipe is not an installed package: find it when this file runs as a script from a checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets

from training.common.command import run_command
from training.data.building.build_file import build_from_file
from training.data.survey import report, survey


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="build.py",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: build.py build.yaml --output data/mine; training/data/building/README.md describes build.yaml",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("build_file", metavar="BUILD.yaml", nargs="?", help="lists the raw data sets and their formats")
    what.add_argument("--survey", metavar="MANIFEST.yaml", help="show rows, languages and missing files; build nothing")
    parser.add_argument("--output", metavar="FOLDER", help="where to write; finished sources are kept")
    parser.add_argument("--data-dir", help="with --survey: folder or hf:// address of the files, if not the manifest's")
    parser.add_argument("--stage", help="with --survey: only the sources of this stage, under its caps")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = make_parser()
    arguments = parser.parse_args(words)
    if not arguments.survey and not arguments.output:
        parser.error("--output is missing; name the folder to write")
    # The bars of `datasets` would outnumber the lines of the log.
    datasets.disable_progress_bars()

    def work() -> None:
        if arguments.survey:
            sys.stdout.write(report(survey(arguments.survey, arguments.data_dir, arguments.stage)))
        else:
            build_from_file(arguments.build_file, arguments.output)

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main())
