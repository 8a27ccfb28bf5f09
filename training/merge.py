"""Average models of one architecture, such as the last checkpoints of a run, or merge an adapter into its base.

python training/merge.py runs/mine/checkpoint-900 runs/mine/checkpoint-1000 runs/mine --output runs/mine-soup
python training/merge.py runs/one runs/other --slerp 0.5 --output merged
python training/merge.py runs/lora/model --output runs/lora/merged
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from training.common.command import command_parser, run_command
from training.models.merging import MAX_SHARD_SIZE, merge_named


def make_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = command_parser("merge.py", __doc__)
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folder, run, checkpoint, ORG/NAME[@REVISION]; or one adapter"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged model")
    average = parser.add_argument_group("to average models")
    how = average.add_mutually_exclusive_group()
    how.add_argument("--weights", type=float, nargs="+", help="weight of each model (default: equal weights)")
    slerp = "spherical interpolation between two models, at T from 0 to 1 (%(const)s)"
    how.add_argument("--slerp", type=float, nargs="?", const=0.5, metavar="T", help=slerp)
    dtypes = ["bfloat16", "float16", "float32"]
    average.add_argument("--dtype", choices=dtypes, help="of the weights written (default: the models' own)")
    average.add_argument("--max-shard-size", help=f"maximum size of a file of weights ({MAX_SHARD_SIZE})")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = vars(make_parser().parse_args(words))

    def work() -> None:
        sys.stdout.write(f"{merge_named(**arguments)}\n")

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main())
