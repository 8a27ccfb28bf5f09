"""The command that turns a finished run into a folder that can be uploaded as it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from training.publishing.licence import OWN_LICENCE
from training.publishing.pack import PackOptions, pack
from training.publishing.weights import DTYPES, MAX_SHARD_SIZE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "run_folder",
        metavar="RUN",
        type=Path,
        help="folder of a finished run, OUTPUT_DIR/STAGE, of a merged model, or of a SentenceTransformer without a run",
    )
    parser.add_argument("--name", required=True, help="of the model, without organisation: f2llm-v2-330m")
    parser.add_argument("--output", type=Path, help="folder to write (default: packed/NAME beside the run)")
    parser.add_argument(
        "--dtype",
        help=f"of the weights: {' or '.join(DTYPES)} (default: that in which they were trained and evaluated)",
    )
    parser.add_argument("--max-shard-size", default=MAX_SHARD_SIZE, help="of a file of weights (%(default)s)")
    parser.add_argument(
        "--licence",
        help=f"of the weights, an SPDX identifier (default: {OWN_LICENCE} where all sources, the start and the teacher "
        "have licences that ask at most for a notice; needed otherwise)",
    )
    parser.add_argument("--licence-file", type=Path, help=f"its text, if it is not {OWN_LICENCE}")
    parser.add_argument("--author", help="whom the card names")
    parser.add_argument("--checkpoint", help="pack this checkpoint of the run: checkpoint-N")
    parser.add_argument(
        "--evaluation",
        type=Path,
        help="folder of the model's evaluation (default: report in the run or beside it, or another there)",
    )
    parser.add_argument(
        "--base",
        metavar="ORG/NAME",
        help="name on the Hub of the model that an adapter adapts, where it was trained on a folder",
    )


def run(arguments: argparse.Namespace) -> None:
    """Packs a run."""
    options = PackOptions(
        name=arguments.name,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        licence=arguments.licence,
        licence_file=arguments.licence_file,
        author=arguments.author,
        checkpoint=arguments.checkpoint,
        evaluation=arguments.evaluation,
        base=arguments.base,
    )
    beside = arguments.run_folder.absolute().parent / "packed"
    pack(arguments.run_folder, arguments.output or beside / arguments.name, options)
