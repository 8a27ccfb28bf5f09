"""Running the stages of a recipe: what may be written where, training or pruning, saving, and evaluating."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from training.common.errors import (
    InterruptedTrainingError,
    OutputError,
    StoppedError,
    UserError,
    in_one_line,
    lost_contact,
)
from training.common.outputs import check_output, locked, publish, write_whole
from training.common.run_folder import (
    DATA,
    FINAL_MODEL,
    RECIPE,
    holds_model,
    last_checkpoint,
    missing_part,
    numbered_checkpoints,
)
from training.common.yaml_file import load_yaml
from training.config.arguments import StageArguments
from training.config.checks import unread_keys
from training.config.inputs import require_inputs
from training.config.recipe import Recipe, Stage, made_by
from training.evaluation.report import check_report_folder
from training.evaluation.stage_pairs import evaluate_and_report
from training.models.saved_prompts import given_prompt, set_query_prompt
from training.stages.continuation import Changes, check_data, check_keys, note_changes
from training.stages.prune_stage import PRUNING_FILES, prune_stage
from training.stages.setup import set_up
from training.trainer.resumption import checkpoint_to_resume
from training.trainer.stopping import Interruption
from training.trainer.trainer import F2LLMTrainer

logger = logging.getLogger("training")

_GO_ON = "run the same command with --resume"
# What a run makes before it starts to train: made again, or checked by fingerprint, when it is started again.
_PREPARATIONS = {
    *("prepared", "tokenizer", ".tokenizer.partial", ".tokenizer.lock", f".{RECIPE}.partial", f".{FINAL_MODEL}.lock"),
    *PRUNING_FILES,
}


class Uploads(NamedTuple):
    """How checkpoints are uploaded. The command passes it in, so that training does not import publishing.

    Attributes:
        start: Makes the callback of a training; its ``end(hurry)`` waits for the uploads, in a hurry for some seconds.
        push_waiting: Uploads the checkpoints of an earlier training that still wait.
    """

    start: Callable[[Interruption], Any]
    push_waiting: Callable[[], None]


def run_recipe(
    recipe: Recipe,
    chosen: Sequence[Stage],
    resume: bool,
    accept_changes: bool,
    uploads_of: Callable[[Stage], Uploads | None],
) -> None:
    """Run stages of a recipe in order; an evaluation follows each that has ``evaluation_pairs``.

    The other arguments are those of :func:`run_stage`.
    """
    require_inputs(recipe, chosen, finished=[stage.name for stage in chosen if holds_model(Path(made_by(stage)))])
    evaluations = _evaluation_files(recipe)
    for stage in chosen:
        logger.info("stage %s", stage.name)
        model = run_stage(stage, resume, accept_changes, more=stage is not chosen[-1], uploads=uploads_of(stage))
        if stage.name in evaluations and stage.arguments.process_index == 0:
            evaluate_and_report(model, stage.arguments, evaluations[stage.name])


def _evaluation_files(recipe: Recipe) -> dict[str, Path]:
    """Return the file of each stage's evaluation: ``evaluation.json`` for the last one; refuse to overwrite others."""
    evaluated = [stage for stage in recipe.stages if stage.arguments.evaluation_pairs]
    files = {stage.name: recipe.output_dir / f"evaluation-{stage.name}.json" for stage in evaluated[:-1]}
    files |= {stage.name: recipe.output_dir / "evaluation.json" for stage in evaluated[-1:]}
    if evaluated:
        check_report_folder(recipe.output_dir / "report", option="output_dir")
    for stage in evaluated:
        path = files[stage.name]
        if path.exists() and load_yaml(path).get("model") != made_by(stage):
            raise UserError(f"{path}: holds the evaluation of another model; move it or give another output_dir")
    return files


def run_stage(
    stage: Stage,
    resume: bool = False,
    accept_changes: bool = False,
    more: bool = False,
    uploads: Uploads | None = None,
) -> Path:
    """Run a stage, of training or of pruning, to its end and return the folder of the finished model.

    On several processes, every one of them calls this.

    Args:
        stage: The stage.
        resume: Go on from the last checkpoint, or return at once if the stage is finished.
        accept_changes: Go on although recipe or data changed since the run was started.
        more: Whether other stages follow. A signal that comes too late to stop this one then stops before them.
        uploads: Uploads the checkpoints, if the stage has ``push_checkpoints``.

    Raises:
        UserError: If something the user gave is faulty, or the output folder holds another run.
        StoppedError: If the training had to stop; its last checkpoint is whole.
    """
    args, output_dir = stage.arguments, Path(stage.arguments.output_dir)
    if args.n_gpu > 1:
        raise UserError(
            f"stage {stage.name!r}: one process drives one device; start one for each of the {args.n_gpu} with "
            "'accelerate launch', or set CUDA_VISIBLE_DEVICES to one of them"
        )
    _check_paths(args)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(output_dir, os.R_OK | os.W_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        raise OutputError(f"{output_dir}: cannot be written ({error})", "give another output_dir") from None
    with _alone(args, output_dir / FINAL_MODEL):
        if args.prunes:
            return _prune(stage, output_dir / FINAL_MODEL, resume, accept_changes)
        return _train(stage, output_dir / FINAL_MODEL, resume, accept_changes, more, uploads)


def _check_paths(args: StageArguments) -> None:
    """Refuse to write where the stage reads: into a model's folder, or into that of the data."""
    models = [Path(name) for name in (args.model, args.teacher) if name is not None]
    for key in ("output_dir", "prepared_dir", "teacher_cache_dir"):
        folder = args.prepared_folder if key == "prepared_dir" else getattr(args, key)
        if not folder:
            continue
        check_output(Path(folder), models, option=key)
        if args.manifest is not None and Path(folder).resolve() == Path(args.manifest).resolve().parent:
            raise UserError(f"{folder}: is the folder of {args.manifest}, which is read; give another {key}")


@contextmanager
def _alone(args: StageArguments, final: Path) -> Iterator[None]:
    """Lock the folder for this command; all of its processes raise a UserError if another command holds it."""
    with ExitStack() as stack:
        refused: list[str | None] = [None]
        if args.process_index == 0:
            try:
                busy = "another process trains there; wait for it to end, or give another output_dir"
                stack.enter_context(locked(final, busy))
            except UserError as error:
                refused = [str(error)]
        if args.world_size > 1:
            torch.distributed.broadcast_object_list(refused)
        if refused[0] is not None:
            raise UserError(refused[0])
        yield


def _prune(stage: Stage, final: Path, resume: bool, accept_changes: bool) -> Path:
    args = stage.arguments
    # Only the first process works; the others find what it made.
    with args.main_process_first(local=args.save_on_each_node):
        if args.should_save:
            _check_run(final.parent, stage, resume, accept_changes)
            if not _is_finished(stage, final):
                prune_stage(stage)
    return final


def _train(stage: Stage, final: Path, resume: bool, accept_changes: bool, more: bool, uploads: Uploads | None) -> Path:
    args, output_dir = stage.arguments, final.parent
    uploads = uploads if args.should_save else None
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        changed = _check_run(output_dir, stage, resume, accept_changes)
        if _is_finished(stage, final):
            if uploads is not None:
                uploads.push_waiting()
            return final
        for line in unread_keys(args, stage.keys) if args.process_index == 0 else ():
            logger.warning("stage %r: %s", stage.name, line)
        checkpoint = checkpoint_to_resume(output_dir) if resume else None
        trainer = set_up(stage)
        _check_sharding(trainer, checkpoint)
        changed |= _record(stage, trainer, checkpoint, accept_changes)
        if args.should_save:
            note_changes(output_dir, changed, checkpoint)
    if args.process_index == 0 and not trainer.saved_prompts.is_trained:
        logger.warning("stage %s: %s", stage.name, trainer.saved_prompts.warning())
    with _uploading(trainer, uploads):
        with _stopped_by(trainer):
            _fill_teacher_cache(trainer)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        number, state = trainer.interruption.signal, trainer.state
        if number and state.global_step < state.max_steps:
            raise InterruptedTrainingError(
                f"{signal.Signals(number).name} at step {state.global_step} of {state.max_steps}; saved "
                f"{last_checkpoint(output_dir)}",
                f"To go on, {_GO_ON}",
                number,
            )
        _save(trainer, final)
        logger.info("stage %s: %s", stage.name, trainer.saved_prompts.line())
    number = trainer.interruption.received()
    if number and more:
        raise InterruptedTrainingError(
            f"{signal.Signals(number).name} after the last step; saved {final}", f"To go on, {_GO_ON}", number
        )
    return final


def _check_run(output_dir: Path, stage: Stage, resume: bool, accept_changes: bool) -> Changes:
    """Refuse an output folder with something that this run would overwrite; return the accepted changes of keys."""
    args = stage.arguments
    # Written below the output folder before the training.
    folders = [args.prepared_folder, args.teacher_cache_dir, args.builder and Path(args.manifest or "").parent]
    names = [name for place in folders if place for name in Path(os.path.relpath(place, output_dir)).parts[:1]]
    ours = {form for name in names for form in (name, f".{name}.partial", f".{name}.lock")}
    held = {path.name for path in output_dir.iterdir()} - _PREPARATIONS - ours
    if held and RECIPE not in held:
        raise OutputError(f"{output_dir}: the folder holds something else", "give another output_dir")
    numbered = numbered_checkpoints(output_dir)
    if numbered and FINAL_MODEL not in held and last_checkpoint(output_dir) is None:
        raise OutputError(
            f"{output_dir}: none of the checkpoints can be resumed from, {numbered[-1].name} lacks "
            f"{missing_part(numbered[-1])}",
            f"start again from 'model: {numbered[-1]}' with another output_dir",
        )
    # A run that ended before its first checkpoint has nothing to lose: its recipe may be corrected.
    if FINAL_MODEL not in held and not numbered:
        return {}
    if not resume:
        raise OutputError(
            f"{output_dir}: the folder holds another run", "add --resume to go on, or give another output_dir"
        )
    return check_keys(output_dir, stage, accept_changes)


def _is_finished(stage: Stage, final: Path) -> bool:
    """Return whether a stage has made its model, which then gets the query prompt that the stage has now."""
    if not holds_model(final):
        return False
    logger.info("stage %s is finished: %s", stage.name, final)
    prompt = given_prompt(stage.arguments) if stage.arguments.should_save else None
    if prompt is not None and set_query_prompt(final, prompt):
        now = {"query_instruction": stage.arguments.query_instruction}
        recipe, arguments = final.parent / RECIPE, final / "training_arguments.json"
        write_whole(recipe, yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **now}, sort_keys=False))
        # A stage that cuts a model has none; a damaged one, which is only for people, stays.
        with suppress(FileNotFoundError, ValueError, TypeError):
            write_whole(arguments, json.dumps({**json.loads(arguments.read_text()), **now}, indent=2))
        logger.info("%s: its query prompt is now %r", final, prompt)
    return True


def _check_sharding(trainer: F2LLMTrainer, checkpoint: Path | None) -> None:
    """Refuse a checkpoint whose optimizer's state cannot be read by this kind of launch."""
    sharded = checkpoint is not None and any(checkpoint.glob("pytorch_model_fsdp*"))
    if checkpoint is not None and sharded != trainer.is_fsdp_enabled:
        then, now = ("with", "without") if sharded else ("without", "with")
        raise UserError(f"{checkpoint}: was written {then} FSDP and cannot be resumed {now} it; launch it {then} FSDP")


def _record(stage: Stage, trainer: F2LLMTrainer, checkpoint: Path | None, accept_changes: bool) -> Changes:
    """Record keys and data of the run; of a resumed run, return the accepted changes of its data."""
    output_dir = Path(stage.arguments.output_dir)
    data = {source.name: source.description["fingerprint"] for source in trainer.sources}
    if trainer.distillation is not None:
        data["the teacher"] = trainer.distillation.identity
    if trainer.base_revision is not None:
        # Checkpoints hold only the adapter.
        data["the base"] = trainer.base_revision
    changed = {} if checkpoint is None else check_data(output_dir / DATA, data, accept_changes)
    if stage.arguments.should_save:
        # The recipe first: it marks the folder as that of a run.
        write_whole(output_dir / RECIPE, yaml.safe_dump(stage.keys, sort_keys=False))
        write_whole(output_dir / DATA, json.dumps(data, indent=2))
    return changed


@contextmanager
def _uploading(trainer: F2LLMTrainer, uploads: Uploads | None) -> Iterator[None]:
    """Upload checkpoints while the block runs, and wait for them after it."""
    if uploads is None:
        yield
        return
    upload = uploads.start(trainer.interruption)
    trainer.add_callback(upload)
    try:
        yield
    except BaseException:
        upload.end(hurry=True)
        raise
    upload.end()


def _fill_teacher_cache(trainer: F2LLMTrainer) -> None:
    try:
        trainer.fill_teacher_cache()
    except OSError as error:
        raise StoppedError(
            f"{trainer.args.teacher_cache_dir}: the teacher's embeddings could not be written ({error}); those that "
            "were stay",
            f"Mend that and {_GO_ON}",
        ) from error


@contextmanager
def _stopped_by(trainer: F2LLMTrainer) -> Iterator[None]:
    """Turn a full disk, a lack of memory or a dead loader worker into a StoppedError that says how to go on."""
    try:
        yield
    except StoppedError:
        raise
    except (OSError, RuntimeError) as error:
        lacks_memory = isinstance(error, torch.OutOfMemoryError)
        if not isinstance(error, OSError) and not lacks_memory and "DataLoader worker" not in str(error):
            raise
        limit = trainer.args.max_tokens_per_forward or "without limit"
        mend = f"Lower 'max_tokens_per_forward', now {limit}," if lacks_memory else "Mend that"
        saved = last_checkpoint(Path(trainer.args.output_dir)) or "none yet"
        raise StoppedError(f"{in_one_line(error)}; last good checkpoint: {saved}", f"{mend} and {_GO_ON}") from error


def _save(trainer: F2LLMTrainer, final: Path) -> None:
    partial = final.with_name(f".{FINAL_MODEL}.partial")
    try:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            # Fails if the run's folder has vanished.
            partial.mkdir()
        trainer.save_model(str(partial))
        if trainer.args.should_save:
            if trainer.projection is not None:
                trainer.projection.export(final.parent)
            publish(partial, final)
    # safetensors raises another error than OSError for a full disk.
    except Exception as error:
        if isinstance(error, StoppedError) or lost_contact(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise StoppedError(
            f"{final}: the finished model could not be written ({in_one_line(error)}); last good checkpoint: "
            f"{last_checkpoint(final.parent) or 'none yet'}",
            f"Mend that and {_GO_ON}",
        ) from error
    trainer.accelerator.wait_for_everyone()
