"""Build training data in the published format from raw data: one parquet file per source, a manifest and a report.

python training/build.py build.yaml --output data/mine

training/data/building/README.md describes build.yaml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

import datasets

from training.common.command import command_parser, run_command
from training.data.building.build_file import build_from_file


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = command_parser("build.py", __doc__)
    parser.add_argument("path", metavar="BUILD.yaml", help="lists the raw data sets and their formats")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to write; finished sources are kept")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(words)
    # The bars of `datasets` would outnumber the lines of the log.
    datasets.disable_progress_bars()
    return run_command(lambda: build_from_file(**vars(arguments)))


if __name__ == "__main__":
    raise SystemExit(main())
