"""Trains the stages of a recipe, one after the other, and evaluates what comes out."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers.utils.logging import disable_progress_bar

from training.common.command import run_command
from training.common.errors import UserError
from training.common.run_folder import holds_model
from training.common.yaml_file import load_yaml
from training.config.inputs import require_inputs
from training.config.recipe import Recipe, Stage, command_line_overrides, load_recipe, made_by, recipe_help
from training.evaluation.finished_stage import evaluate_and_report
from training.evaluation.report import check_report_folder
from training.evaluation.stage_pairs import check_stage_pairs
from training.planning.dry_run import device_overrides, show_plans
from training.stages.stage import Uploads, run_stage
from training.trainer.interruption import ended_by_signals

QUICKSTART = Path(__file__).resolve().parent / "recipes" / "quickstart" / "recipe.yaml"

logger = logging.getLogger("training")


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    # The bars of reading and writing weights, not the one of training.
    disable_progress_bar()

    def work() -> None:
        with ended_by_signals():
            _run(_arguments(words))

    status = run_command(work, resumes=True)
    # Only after good work: with some processes gone, the others would wait for them here.
    if status == 0 and torch.distributed.is_initialized():
        # Together: a process that is still at work ends in a crash when another closes the connections.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return status


def _arguments(words: list[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if words is None else list(words)
    recipe = Path(words.pop(0)) if words and not words[0].startswith("-") else QUICKSTART
    parser = argparse.ArgumentParser(
        prog="run_stage.py",
        usage="%(prog)s [RECIPE.yaml] [--stage NAME] [--dry-run [--measure] | --resume [--accept-changes]] "
        "[--key value ...]",
        description=f"{__doc__} Without a recipe, the quickstart runs.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--stage", action="append", help="run this stage of the recipe only (repeatable)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints; skip finished stages")
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume although recipe or data changed since the run was started"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what each stage reads and makes, its steps, tokens, memory and FLOPs, but do not train; data that "
        "is on this machine is prepared and counted, other data is estimated from what the manifest says of it",
    )
    parser.add_argument("--measure", action="store_true", help="with --dry-run: run ten steps for time and memory")
    parser.add_argument("-h", "--help", action="store_true", help="describe this command and every key of a recipe")
    arguments, keys = parser.parse_known_args(words)
    if arguments.help:
        sys.stdout.write(f"{parser.format_help()}\nKeys of a recipe, also given as --key value:\n\n{recipe_help()}")
        raise SystemExit(0)
    if arguments.measure and not arguments.dry_run:
        raise UserError("command line: --measure belongs to --dry-run; add it")
    arguments.recipe, arguments.overrides = recipe, command_line_overrides(keys)
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    overrides = {**device_overrides(), **arguments.overrides} if arguments.dry_run else arguments.overrides
    recipe = load_recipe(arguments.recipe, overrides)
    names = [stage.name for stage in recipe.stages]
    for name in arguments.stage or []:
        if name not in names:
            raise UserError(f"{recipe.path}: no stage {name!r}; there are {', '.join(names)}")
    chosen = [stage for stage in recipe.stages if not arguments.stage or stage.name in arguments.stage]
    check_stage_pairs([stage.arguments for stage in chosen])
    if arguments.dry_run:
        show_plans(recipe, chosen, arguments.measure)
        return
    made = [stage.name for stage in chosen if holds_model(Path(made_by(stage)))]
    require_inputs(recipe, chosen, finished=made)
    evaluations = _evaluation_files(recipe)
    for stage in chosen:
        logger.info("stage %s", stage.name)
        more = stage is not chosen[-1]
        model = run_stage(stage, arguments.resume, arguments.accept_changes, more, _uploads(stage))
        if stage.name in evaluations and stage.arguments.process_index == 0:
            evaluate_and_report(model, stage.arguments, evaluations[stage.name])


def _uploads(stage: Stage) -> Uploads | None:
    repo, run = stage.arguments.push_checkpoints, Path(stage.arguments.output_dir)
    if not repo:
        return None
    # The Hub client and the cards are loaded only by runs that upload.
    from training.publishing.hub.push_callback import push_callback, push_what_waits

    return Uploads(partial(push_callback, repo, run), partial(push_what_waits, repo, run))


def _evaluation_files(recipe: Recipe) -> dict[str, Path]:
    """Where each stage's evaluation goes: the last one's to evaluation.json, the others' beside it.

    Raises:
        UserError: If a file holds the evaluation of another model, or the folder of the report something else.
    """
    evaluated = [stage for stage in recipe.stages if stage.arguments.evaluation_pairs]
    files = {stage.name: recipe.output_dir / f"evaluation-{stage.name}.json" for stage in evaluated[:-1]}
    files |= {stage.name: recipe.output_dir / "evaluation.json" for stage in evaluated[-1:]}
    if evaluated:
        check_report_folder(recipe.output_dir / "report", option="output_dir")
    for stage in evaluated:
        path, model = files[stage.name], made_by(stage)
        if path.exists() and load_yaml(path).get("model") != model:
            raise UserError(f"{path}: holds the evaluation of another model; move it or give another output_dir")
    return files


if __name__ == "__main__":
    raise SystemExit(main())
