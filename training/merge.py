"""Averages models of one architecture, such as the last checkpoints of a run, into one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from training.common.command import run_command
from training.models.merging.merging import merge
from training.models.merging.method import mean_of, slerp_of
from training.models.merging.parents import find_parent
from training.models.merging.streaming import MAX_SHARD_SIZE

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    arguments = _arguments(words)
    return run_command(lambda: _run(arguments))


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="merge.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="a folder, a run, a checkpoint of it, or ORG/NAME[@REVISION]"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged model")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--weights", type=float, nargs="+", help="what each model counts (default: all alike)")
    how.add_argument(
        "--slerp",
        type=float,
        nargs="?",
        const=0.5,
        metavar="T",
        help="go from the first of two models to the second on a great circle, so far (0.5)",
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="of the weights written (default: the models' own)")
    parser.add_argument("--max-shard-size", default=MAX_SHARD_SIZE, help="of a file of weights at most (%(default)s)")
    return parser.parse_args(words)


def _run(arguments: argparse.Namespace) -> None:
    number = len(arguments.models)
    method = mean_of(number, arguments.weights) if arguments.slerp is None else slerp_of(number, arguments.slerp)
    parents = [find_parent(word) for word in arguments.models]
    dtype = arguments.dtype and _DTYPES[arguments.dtype]
    record = merge(parents, method, arguments.output, dtype, arguments.max_shard_size)
    counted = ", ".join(f"{each['weight']:.4g} {each['name']}" for each in record["parents"])
    sys.stdout.write(f"{arguments.output}: {record['method']} of {counted}, in {record['dtype']}\n")


if __name__ == "__main__":
    raise SystemExit(main())
