"""Make a dataset release: the sources of a manifest as parquet files that stream, with a card for the Hub.

python training/release.py --manifest data/clean/manifest.yaml --output release
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from training.common.command import command_parser, require, run_command

if __name__ == "__main__":
    require("matplotlib", "publish")

from training.data.releasing import MAX_FILE_BYTES, release


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser("release.py", __doc__)
    parser.add_argument("--manifest", type=Path, required=True, help="sources in the published format")
    parser.add_argument("--output", type=Path, required=True, help="folder of the release; it is made")
    parser.add_argument("--data-dir", help="folder or address of the files, instead of the manifest's")
    parser.add_argument("--sources", nargs="+", help="release these only (`*` as in file names)")
    parser.add_argument("--name", help="title of the card (default: name of the output folder)")
    parser.add_argument("--repository", help="repository in the card's examples (default: name of the output folder)")
    parser.add_argument("--licence", help="of the release as a whole (default: those of the sources)")
    parser.add_argument("--contamination", type=Path, help="contamination.json of this data")
    parser.add_argument("--max-file-mb", type=int, default=MAX_FILE_BYTES // 10**6, help="size of a file (%(default)s)")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = vars(make_parser().parse_args(words))
    max_file_bytes = given.pop("max_file_mb") * 10**6
    return run_command(lambda: release(**given, max_file_bytes=max_file_bytes))


if __name__ == "__main__":
    raise SystemExit(main())
