"""Train the stages of a recipe (default: the quickstart), one after the other, and evaluate what comes out.

python training/run_stage.py --data my.jsonl --model FOLDER_OR_HUB_NAME --output_dir runs/mine
python training/run_stage.py my_recipe.yaml --output_dir runs/mine --learning_rate 2e-5 --resume
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

import torch
from transformers.utils.logging import disable_progress_bar

from training.common.command import command_parser, run_command
from training.common.errors import UserError
from training.config.recipe import Stage, command_line_overrides, load_recipe, recipe_help
from training.evaluation.pairs import check_stage_pairs
from training.planning.devices import find_fleet
from training.planning.plan import device_overrides, show_plans
from training.stages.own_data import check_own_data
from training.stages.setup import read_sources
from training.stages.stage import Uploads, run_recipe
from training.trainer.stopping import ended_by_signals

RECIPES = Path(__file__).resolve().parent / "recipes"
QUICKSTART, FINE_TUNING = RECIPES / "quickstart" / "recipe.yaml", RECIPES / "finetune" / "default.yaml"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command, without the keys of a recipe."""
    parser = command_parser("run_stage.py", __doc__, add_help=False)
    flag = {"action": "store_true"}
    parser.add_argument("recipe", nargs="?", type=Path, default=QUICKSTART, help="the recipe, a YAML file")
    parser.add_argument("--stage", action="append", help="run this stage of the recipe only (repeatable)")
    parser.add_argument("--resume", **flag, help="go on from the last checkpoints; skip finished stages")
    accept = "resume although recipe or data changed since the run was started"
    parser.add_argument("--accept-changes", **flag, help=accept)
    plan = "show what each stage reads and makes, its steps, tokens, memory and FLOPs; prepares local data to count it"
    parser.add_argument("--dry-run", **flag, help=plan)
    parser.add_argument("--measure", **flag, help="with --dry-run: run ten steps for time and memory")
    fleet = "with --dry-run: predict memory, time and GPU-hours of each stage for so many devices, as a table"
    parser.add_argument("--devices", type=int, metavar="N", help=fleet)
    parser.add_argument(
        "--device", metavar="NAME", help="of which kind they are: H200 (default), H100, A100, RTX-4090, cpu"
    )
    reached = "part of the device's matrix rate that a step reaches, if it was measured (tests/benchmarks/gpu.py)"
    parser.add_argument("--fraction", type=float, metavar="F", help=reached)
    parser.add_argument("-h", "--help", **flag, help="describe this command and every key of a recipe")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    # The bars of reading and writing weights.
    disable_progress_bar()
    words = sys.argv[1:] if words is None else list(words)
    # argparse would take the value of an unknown key for the recipe.
    if not words or words[0].startswith("-"):
        own = any(word.partition("=")[0] == "--data" for word in words)
        words = [str(FINE_TUNING if own else QUICKSTART), *words]

    status = run_command(lambda: _run(words), resumes=True)
    # Only after good work: with some processes gone, the others would wait for them here.
    if status == 0 and torch.distributed.is_initialized():
        # Together: a process that is still at work crashes when another closes the connections.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return status


@ended_by_signals()
def _run(words: list[str]) -> None:
    parser = make_parser()
    arguments, keys = parser.parse_known_args(words)
    if arguments.help:
        sys.stdout.write(f"{parser.format_help()}\nKeys of a recipe, also given as --key value:\n\n{recipe_help()}")
        raise SystemExit(0)
    if arguments.measure and not arguments.dry_run:
        raise UserError("command line: --measure belongs to --dry-run; add it")
    fleet = None
    if (arguments.devices, arguments.device, arguments.fraction) != (None,) * 3:
        if not arguments.dry_run or arguments.measure:
            raise UserError("command line: --devices, --device and --fraction belong to --dry-run without --measure")
        fleet = find_fleet(arguments.device, arguments.devices, arguments.fraction)
    overrides = {**(device_overrides() if arguments.dry_run else {}), **command_line_overrides(keys)}
    recipe = load_recipe(arguments.recipe, overrides)
    names = [stage.name for stage in recipe.stages]
    for name in arguments.stage or []:
        if name not in names:
            raise UserError(f"{recipe.path}: no stage {name!r}; there are {', '.join(names)}")
    chosen = [stage for stage in recipe.stages if stage.name in (arguments.stage or names)]
    check_stage_pairs([stage.arguments for stage in chosen])
    for stage in chosen:
        check_own_data(stage.arguments)
    if arguments.dry_run:
        for stage in chosen:
            if stage.arguments.data:
                # Plans take a manifest that is not there for one of another machine.
                read_sources(stage.arguments)
        show_plans(recipe, chosen, arguments.measure, fleet)
        return
    # Before anything runs: they are checked here.
    uploads = {stage.name: _uploads(stage) for stage in chosen}
    run_recipe(recipe, chosen, arguments.resume, arguments.accept_changes, lambda stage: uploads[stage.name])


def _uploads(stage: Stage) -> Uploads | None:
    repo, run = stage.arguments.push_checkpoints, Path(stage.arguments.output_dir)
    if not repo or stage.arguments.prunes or stage.arguments.process_index:
        return None
    # The Hub client and the cards are loaded only by runs that upload.
    from training.publishing.hub.callback import check_uploads, push_callback, push_pending

    check_uploads(run)
    return Uploads(partial(push_callback, repo, run), partial(push_pending, repo, run))


if __name__ == "__main__":
    raise SystemExit(main())
