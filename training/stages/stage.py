"""Running one stage: what may be written where, training, saving."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

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
from training.common.outputs import check_output, locked
from training.common.run_folder import (
    DATA,
    FINAL_MODEL,
    RECIPE,
    holds_model,
    last_checkpoint,
    missing_part,
    numbered_checkpoints,
    publish,
    write_whole,
)
from training.config.arguments import StageArguments
from training.config.recipe import Stage
from training.config.unread_keys import unread_keys
from training.models.saved_prompts import given_prompt, set_query_prompt
from training.stages.continuation import Changes, check_data, check_keys, note_changes
from training.stages.prune_stage import PRUNING_FILES, prune_stage
from training.stages.setup import set_up
from training.trainer.checkpoint_check import checkpoint_to_resume
from training.trainer.interruption import Interruption
from training.trainer.trainer import F2LLMTrainer

logger = logging.getLogger(__name__)

_GO_ON = "run the same command with --resume"

# What a run makes before it starts to train: made again, or checked by fingerprint, when it is started again.
_PREPARATIONS = {
    *("prepared", "tokenizer", ".tokenizer.partial", ".tokenizer.lock", f".{RECIPE}.partial", f".{FINAL_MODEL}.lock"),
    *PRUNING_FILES,
}


class UploadCallback(Protocol):
    """A Trainer callback that uploads checkpoints in the background."""

    def end(self, hurry: bool = False) -> None:
        """Wait for the uploads under way; ``hurry``: only for a few seconds."""


class Uploads(NamedTuple):
    """How checkpoints are uploaded. The command passes it in, so that training does not import publishing.

    Attributes:
        start: Makes the callback of a training.
        push_waiting: Uploads what an earlier training left waiting.
    """

    start: Callable[[Interruption], UploadCallback]
    push_waiting: Callable[[], None]


def run_stage(
    stage: Stage,
    resume: bool = False,
    accept_changes: bool = False,
    more: bool = False,
    uploads: Uploads | None = None,
) -> Path:
    """Runs a stage, of training or of pruning, to its end and returns the folder of the finished model.

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
    args = stage.arguments
    if args.n_gpu > 1:
        raise UserError(
            f"stage {stage.name!r}: one process drives one device; start one for each of the {args.n_gpu} with "
            "'accelerate launch', or set CUDA_VISIBLE_DEVICES to one of them"
        )
    output_dir = Path(args.output_dir)
    _check_places(args)
    _make_writable(output_dir)
    with _alone(args, output_dir / FINAL_MODEL):
        return _run(stage, resume, accept_changes, more, uploads)


def _run(stage: Stage, resume: bool, accept_changes: bool, more: bool, uploads: Uploads | None) -> Path:
    args = stage.arguments
    uploads = uploads if args.should_save else None
    output_dir = Path(args.output_dir)
    final = output_dir / FINAL_MODEL
    if args.prunes:
        with args.main_process_first(local=args.save_on_each_node):
            # Only the first process works; the others find what it made.
            if args.should_save:
                _check_output(output_dir, stage, resume, accept_changes)
                if _finished(stage, final):
                    return final
                prune_stage(stage)
        return final
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        changed = _check_output(output_dir, stage, resume, accept_changes)
        if _finished(stage, final):
            if uploads is not None:
                uploads.push_waiting()
            return final
        if args.process_index == 0:
            for line in unread_keys(stage):
                logger.warning(line)
        checkpoint = checkpoint_to_resume(output_dir) if resume else None
        trainer = set_up(stage)
        _check_sharding(trainer, checkpoint)
        changed |= _record(output_dir, stage, trainer, checkpoint, accept_changes)
        if args.should_save:
            note_changes(output_dir, changed, checkpoint)
    if args.process_index == 0 and not trainer.saved_prompts.is_trained:
        logger.warning("stage %s: %s", stage.name, trainer.saved_prompts.warning())
    with _uploading(trainer, uploads):
        _fill_teacher_cache(trainer)
        _train(trainer, checkpoint)
        _save(trainer, final)
        logger.info("stage %s: %s", stage.name, trainer.saved_prompts.line())
    number = trainer.interruption.received()
    if number and more:
        raise InterruptedTrainingError(
            f"{signal.Signals(number).name} after the last step; saved {final}", f"To go on, {_GO_ON}", number
        )
    return final


@contextmanager
def _uploading(trainer: F2LLMTrainer, uploads: Uploads | None) -> Iterator[None]:
    """Uploads checkpoints while the block runs; after it, when the finished model is saved, waits for them."""
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


@contextmanager
def _alone(args: StageArguments, final: Path) -> Iterator[None]:
    """Makes sure that no other command trains in the folder until the block ends, or the first process does.

    Raises:
        UserError: In every process of this command, if another one is at it.
    """
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


def _finished(stage: Stage, final: Path) -> bool:
    """Whether a stage has made its model."""
    if not holds_model(final):
        return False
    logger.info("stage %s is finished: %s", stage.name, final)
    if stage.arguments.should_save:
        _set_prompt(stage, final)
    return True


def _set_prompt(stage: Stage, final: Path) -> None:
    """Gives a finished model the query prompt that its stage is told now, and notes it where the stage's keys are."""
    prompt = given_prompt(stage.arguments)
    if prompt is None or not set_query_prompt(final, prompt):
        return
    told = {"query_instruction": stage.arguments.query_instruction}
    recipe, arguments = final.parent / RECIPE, final / "training_arguments.json"
    write_whole(recipe, yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **told}, sort_keys=False))
    # A stage that cuts a model leaves none; a damaged one, which is written for people alone, stays.
    with suppress(FileNotFoundError, ValueError, TypeError):
        write_whole(arguments, json.dumps({**json.loads(arguments.read_text()), **told}, indent=2))
    logger.info("%s: its query prompt is now %r", final, prompt)


def _check_sharding(trainer: F2LLMTrainer, checkpoint: Path | None) -> None:
    """Makes sure that the optimizer's state can be read by this kind of launch."""
    if checkpoint is None:
        return
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if sharded != trainer.is_fsdp_enabled:
        kinds = ("with", "without") if sharded else ("without", "with")
        raise UserError(
            f"{checkpoint}: was written {kinds[0]} FSDP and cannot be resumed {kinds[1]} it; launch it {kinds[0]} FSDP"
        )


def _fill_teacher_cache(trainer: F2LLMTrainer) -> None:
    try:
        trainer.fill_teacher_cache()
    except OSError as error:
        raise StoppedError(
            f"{trainer.args.teacher_cache_dir}: the teacher's embeddings could not be written ({error}); those that "
            "were stay",
            f"Mend that and {_GO_ON}",
        ) from error


def _train(trainer: F2LLMTrainer, checkpoint: Path | None) -> None:
    """Trains to the end.

    Raises:
        StoppedError: If that is not to be; the message says how to go on.
    """
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except StoppedError:
        raise
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError | torch.OutOfMemoryError) and "DataLoader worker" not in str(error):
            raise
        saved = last_checkpoint(Path(trainer.args.output_dir)) or "none yet"
        mend = "Mend that"
        if isinstance(error, torch.OutOfMemoryError):
            mend = f"Lower 'max_tokens_per_forward', now {trainer.args.max_tokens_per_forward or 'without limit'},"
        raise StoppedError(f"{in_one_line(error)}; last good checkpoint: {saved}", f"{mend} and {_GO_ON}") from error
    number = trainer.interruption.signal
    if number and trainer.state.global_step < trainer.state.max_steps:
        raise InterruptedTrainingError(
            f"{signal.Signals(number).name} at step {trainer.state.global_step} of {trainer.state.max_steps}; saved "
            f"{last_checkpoint(Path(trainer.args.output_dir))}",
            f"To go on, {_GO_ON}",
            number,
        )


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
    # A full disk comes out of safetensors as an error of its own.
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


def _make_writable(output_dir: Path) -> None:
    """Makes the output folder."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(output_dir, os.R_OK | os.W_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        raise OutputError(f"{output_dir}: cannot be written ({error})", "give another output_dir") from None


def _check_output(output_dir: Path, stage: Stage, resume: bool, accept_changes: bool) -> Changes:
    """Makes sure that the output folder holds nothing that this run would overwrite.

    Returns:
        What the stage was told otherwise when it was started, where it goes on.
    """
    held = {path.name for path in output_dir.iterdir()} - _PREPARATIONS - _placed_below(stage.arguments)
    if held and RECIPE not in held:
        raise OutputError(f"{output_dir}: the folder holds something else", "give another output_dir")
    numbered = numbered_checkpoints(output_dir)
    if numbered and FINAL_MODEL not in held and last_checkpoint(output_dir) is None:
        raise OutputError(
            f"{output_dir}: none of the checkpoints can be resumed from, {numbered[-1].name} lacks "
            f"{missing_part(numbered[-1])}",
            f"start again from 'model: {numbered[-1]}' with another output_dir",
        )
    started = FINAL_MODEL in held or bool(numbered)
    if started and not resume:
        raise OutputError(
            f"{output_dir}: the folder holds another run", "add --resume to go on, or give another output_dir"
        )
    # A run that ended before its first checkpoint has nothing to lose: its recipe may be corrected.
    return check_keys(output_dir, stage, accept_changes) if started else {}


def _placed_below(args: StageArguments) -> set[str]:
    """Names in the output folder of what the stage's keys have made there before it trains."""
    places = [args.prepared_folder, args.teacher_cache_dir, args.builder and Path(args.manifest or "").parent]
    names = [name for place in places if place for name in Path(os.path.relpath(place, args.output_dir)).parts[:1]]
    return {form for name in names for form in (name, f".{name}.partial", f".{name}.lock")}


def _check_places(args: StageArguments) -> None:
    """Refuses to write where the stage reads: a model's folder is known by its files, data by its folder.

    Raises:
        UserError: If a place to write is, holds or lies in a model that is read, or is the folder of the data.
    """
    models = [Path(name) for name in (args.model, args.teacher) if name is not None]
    places = {"output_dir": args.output_dir, "prepared_dir": args.prepared_folder}
    places |= {"teacher_cache_dir": args.teacher_cache_dir} if args.teacher_cache_dir else {}
    for key, place in places.items():
        check_output(Path(place), models, option=key)
        if args.manifest is not None and Path(place).resolve() == Path(args.manifest).resolve().parent:
            raise UserError(f"{place}: is the folder of {args.manifest}, which is read; give another {key}")


def _record(
    output_dir: Path, stage: Stage, trainer: F2LLMTrainer, checkpoint: Path | None, accept_changes: bool
) -> Changes:
    """Notes what the run is made of, or checks that a continued run is made of the same; returns what is not."""
    data = {source.name: source.description["fingerprint"] for source in trainer.sources}
    if trainer.distillation is not None:
        data["the teacher"] = trainer.distillation.identity
    if trainer.base_revision is not None:
        # Checkpoints hold the adapter alone.
        data["the base"] = trainer.base_revision
    noted = output_dir / DATA
    changed = {} if checkpoint is None else check_data(noted, data, accept_changes)
    if stage.arguments.should_save:
        # First what tells the folder from a foreign one.
        write_whole(output_dir / RECIPE, yaml.safe_dump(stage.keys, sort_keys=False))
        write_whole(noted, json.dumps(data, indent=2))
    return changed
