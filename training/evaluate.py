"""Evaluate models with mteb on its tasks, its benchmarks or local data, and write a report.

python training/evaluate.py MODEL --benchmark "MTEB(Multilingual, v2)" --against OTHER_MODEL
python training/evaluate.py runs/mine --local my_pairs.parquet --dims 320 64 8 --precisions float32 int8 binary
python training/evaluate.py --report runs/evaluation --compare MODEL OTHER_MODEL
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from training.common.command import command_parser, require, run_command
from training.evaluation.records import DEFAULT_MAX_LENGTH, PRECISIONS
from training.evaluation.report import report_again


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = command_parser("evaluate.py", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="MODEL", help="folder, run or Hub name")
    what.add_argument("--report", type=Path, metavar="FOLDER", help="only write the report of this evaluation again")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", nargs="+", default=[], help="mteb's names")
    tasks.add_argument("--benchmark", help="mteb's name")
    tasks.add_argument("--local", nargs="+", default=[], help="parquet files of pairs; built or prepared folders")
    views = parser.add_argument_group("models and views")
    views.add_argument("--against", nargs="+", default=[], help="further models")
    views.add_argument("--revision", nargs="+", default=[], help="revisions or checkpoints of MODEL, or 'all'")
    views.add_argument("--dims", nargs="+", type=int, default=[], help="leading dimensions (default: all of them)")
    views.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["float32"])
    layers = "end after these layers, too, in one encoding pass (none named: those trained as exits)"
    views.add_argument("--layers", nargs="*", type=int, help=layers)
    ranks = "of factorised token embeddings, one encoding pass each (default: the largest)"
    views.add_argument("--ranks", nargs="+", type=int, default=[None], help=ranks)
    views.add_argument("--max-length", type=int, default=DEFAULT_MAX_LENGTH, help="maximum tokens (%(default)s)")
    prompts = "before queries: F2LLM-v2's for mteb's tasks, the model's own, or what fits (%(default)s)"
    views.add_argument("--prompts", choices=["auto", "published", "model"], default="auto", help=prompts)
    devices = "encode on all of these, such as cuda:0 cuda:1 or cpu cpu (default: all CUDA devices)"
    views.add_argument("--devices", nargs="+", metavar="DEVICE", help=devices)
    cache = (
        "encode each text of all tasks once, sorted by length, and divide the tasks over the processes of a launch; "
        "embeddings take so many GiB on the disk of --output at once"
    )
    views.add_argument("--embedding-cache", type=float, metavar="GIB", help=cache)
    trust = "run code that comes with a model; it can do and read all that you can, your Hub token included"
    views.add_argument("--trust-remote-code", action="store_true", help=trust)
    report = parser.add_argument_group("report")
    report.add_argument("--compare", nargs=2, metavar=("A", "B"), help="test two models, by their labels in the tables")
    report.add_argument("--manifest", type=Path, help="of the training, for resource classes (default: that of MODEL)")
    report.add_argument("--run", nargs="+", type=Path, default=[], help="with --report: trainings, for their curves")
    report.add_argument("--output", type=Path, help="folder (default: runs/evaluation, or that of --report)")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = make_parser().parse_args(words)
    if args.report:
        return run_command(lambda: report_again(args))
    require("mteb", "eval")
    # They take seconds to load, and a report does not need them.
    from training.evaluation.runner import evaluate
    from training.models.devices import with_all_processes

    return with_all_processes(lambda: run_command(lambda: evaluate(args)))


if __name__ == "__main__":
    raise SystemExit(main())
