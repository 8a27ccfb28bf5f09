"""Running one stage: what may be written where, training, saving."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import yaml

from training.checkpoints import holds_model, last_checkpoint, numbered_checkpoints, publish, write_whole
from training.errors import InterruptedTrainingError, OutputError, StoppedError, UserError, in_one_line, lost_contact
from training.prune_stage import PRUNING_FILES, prune_stage
from training.recipe import FINAL_MODEL, Stage
from training.setup import RECIPE, set_up
from training.trainer import F2LLMTrainer

__all__ = ["run_stage"]

logger = logging.getLogger(__name__)

_GO_ON = "run the same command with --resume"

DATA = "data.json"
# What a run makes before it starts to train: made anew, or checked by fingerprint, when it is started again.
_PREPARATIONS = {"prepared", "tokenizer", f".{RECIPE}.partial", *PRUNING_FILES}
# Keys that may differ between a run and its continuation: none of them changes what is learnt.
_FREE_KEYS = {
    *("output_dir", "logging_steps", "logging_first_step", "report_to", "disable_tqdm", "save_total_limit"),
    *("max_tokens_per_forward", "compile", "attn_implementation", "gradient_checkpointing", "use_cpu"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
    # Where the teacher's embeddings are kept; read from there, they are rounded to float16.
    "teacher_cache_dir",
    *("ddp_timeout", "ddp_backend", "ddp_bucket_cap_mb", "save_on_each_node"),
    *("model_family", "planned_text_tokens"),
    *("early_stopping_patience", "early_stopping_threshold", "push_checkpoints"),
}
# Nor do these, unless the best model is chosen by them: then scores before and after a change would not compare.
_SAMPLE_KEYS = {"evaluation_sample", "evaluation_sample_candidates"}


def run_stage(stage: Stage, resume: bool = False, accept_changes: bool = False, more: bool = False) -> Path:
    """Runs a stage, of training or of pruning, to its end and returns the folder of the finished model.

    On several processes, every one of them calls this.

    Args:
        stage: The stage.
        resume: Go on from the last checkpoint, or return at once if the stage is finished.
        accept_changes: Go on although recipe or data changed since the run was started.
        more: Whether other stages follow. A signal that comes too late to stop this one then stops before them.

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
        _check_output(output_dir, stage, resume, accept_changes)
        if _finished(stage, final):
            _push_what_waits(stage)
            return final
        trainer = set_up(stage)
        checkpoint = last_checkpoint(output_dir) if resume else None
        _check_sharding(trainer, checkpoint)
        _record(output_dir, stage, trainer, checkpoint, accept_changes)
    _fill_teacher_cache(trainer)
    try:
        _train(trainer, checkpoint)
        _save(trainer, final)
    except BaseException:
        _end_uploads(trainer, hurry=True)
        raise
    # Only now: what is uploaded can wait, the model cannot.
    _end_uploads(trainer)
    number = trainer.interruption.received()
    if number and more:
        raise InterruptedTrainingError(
            f"{signal.Signals(number).name} after the last step; saved {final}", f"To go on, {_GO_ON}", number
        )
    return final


def _finished(stage: Stage, final: Path) -> bool:
    """Whether a stage has made its model."""
    if not holds_model(final):
        return False
    logger.info("stage %s is finished: %s", stage.name, final)
    return True


def _push_what_waits(stage: Stage) -> None:
    """Uploads the checkpoints that a finished training could not."""
    args = stage.arguments
    if args.push_checkpoints and args.should_save:
        from training.publishing.push_callback import push_what_waits

        push_what_waits(args.push_checkpoints, Path(args.output_dir))


def _end_uploads(trainer: F2LLMTrainer, hurry: bool = False) -> None:
    """Waits for the uploads of checkpoints for a while, and says what became of them."""
    if trainer.args.push_checkpoints:
        from training.publishing.push_callback import PushCheckpoints

        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PushCheckpoints):
                callback.end(hurry)


def _check_sharding(trainer: F2LLMTrainer, checkpoint: Path | None) -> None:
    """Makes sure that the optimizer's state can be read by this kind of launch."""
    if checkpoint is None:
        return
    sharded = any(checkpoint.glob("pytorch_model_fsdp*"))
    if sharded != trainer.is_fsdp_enabled:
        kinds = ("with", "without") if sharded else ("without", "with")
        raise UserError(f"{checkpoint}: was written {kinds[0]} FSDP and cannot be resumed {kinds[1]} it; launch alike")


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
        if not isinstance(error, OSError) and "DataLoader worker" not in str(error):
            raise
        saved = last_checkpoint(Path(trainer.args.output_dir)) or "none yet"
        raise StoppedError(f"{in_one_line(error)}; last good checkpoint: {saved}", f"Mend that and {_GO_ON}") from error
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


def _check_output(output_dir: Path, stage: Stage, resume: bool, accept_changes: bool) -> None:
    """Makes sure that the output folder can be written and holds nothing that this run would overwrite."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        held = {path.name for path in output_dir.iterdir()} - _PREPARATIONS
        if not os.access(output_dir, os.W_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        raise OutputError(f"{output_dir}: cannot be written ({error})", "give another output_dir") from None
    if held and RECIPE not in held:
        raise OutputError(f"{output_dir}: the folder holds something else", "give another output_dir")
    numbered = numbered_checkpoints(output_dir)
    if numbered and FINAL_MODEL not in held and last_checkpoint(output_dir) is None:
        raise OutputError(
            f"{output_dir}: none of the checkpoints can be resumed from, {numbered[-1].name} and others lack the state "
            "of the training",
            f"start anew from 'model: {numbered[-1]}' with another output_dir",
        )
    started = FINAL_MODEL in held or bool(numbered)
    if started and not resume:
        raise OutputError(
            f"{output_dir}: the folder holds another run", "add --resume to go on, or give another output_dir"
        )
    # A run that ended before its first checkpoint has nothing to lose: its recipe may be corrected.
    if started:
        _check_same_recipe(output_dir / RECIPE, stage, accept_changes)


def _record(
    output_dir: Path, stage: Stage, trainer: F2LLMTrainer, checkpoint: Path | None, accept_changes: bool
) -> None:
    """Notes what the run is made of, or checks that a continued run is made of the same."""
    data = {source.name: source.description["fingerprint"] for source in trainer.sources}
    if trainer.distillation is not None:
        data["the teacher"] = trainer.distillation.identity
    if trainer.base_revision is not None:
        # Checkpoints hold the adapter alone.
        data["the base"] = trainer.base_revision
    noted = output_dir / DATA
    if checkpoint is not None and noted.exists():
        before = json.loads(noted.read_text())
        changed = sorted(name for name in {*before, *data} if before.get(name) != data.get(name))
        if changed:
            _changed(f"{noted}: the data changed since the run started ({', '.join(changed)})", accept_changes)
    if stage.arguments.should_save:
        # First what tells the folder from a foreign one.
        write_whole(output_dir / RECIPE, yaml.safe_dump(stage.keys, sort_keys=False))
        write_whole(noted, json.dumps(data, indent=2))


def _changed(what: str, accepted: bool) -> None:
    """Warns of a change since the run was started, or refuses it."""
    if not accepted:
        raise OutputError(what, "undo it, give another output_dir, or add --accept-changes to go on regardless")
    logger.warning("%s; going on regardless", what)


def _check_same_recipe(written: Path, stage: Stage, accept_changes: bool) -> None:
    before, keys = yaml.safe_load(written.read_text()), stage.keys
    free = _FREE_KEYS if stage.arguments.chooses_by_pairs else _FREE_KEYS | _SAMPLE_KEYS
    changed = sorted(key for key in {*before, *keys} - free if _plain(before.get(key)) != _plain(keys.get(key)))
    if changed:
        differences = ", ".join(f"{key}: {before.get(key)!r} → {keys.get(key)!r}" for key in changed)
        _changed(f"{written}: the run was started with other keys ({differences})", accept_changes)


def _plain(value: Any) -> Any:
    """A value as the command line would give it."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return value if value is None or isinstance(value, dict) else str(value).lower()
