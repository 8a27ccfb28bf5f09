"""Build training data in the published format from raw data: one parquet file per source, a manifest and a report.

python training/build.py build.yaml --output data/mine

training/data/building/README.md describes build.yaml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The recipe is not an installed package: find it when this file runs as a script from a checkout.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets

from training.common.command import command_parser, run_command
from training.data.building.build_file import build_from_file


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = command_parser("build.py", __doc__)
    parser.add_argument("build_file", metavar="BUILD.yaml", help="lists the raw data sets and their formats")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to write; finished sources are kept")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(words)
    # The bars of `datasets` would outnumber the lines of the log.
    datasets.disable_progress_bars()

    def work() -> None:
        build_from_file(arguments.build_file, arguments.output)

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main())
