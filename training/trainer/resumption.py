"""Going on from a checkpoint: whether it is whole, and what the stage may have changed since it was written."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, TrainingArguments

from training.common.errors import OutputError, StoppedError, UserError, in_one_line, lost_contact
from training.common.run_folder import checkpoints, last_checkpoint, missing_part, numbered_checkpoints, step_of
from training.models.model_folder import read_json
from training.trainer.stopping import EarlyStopping

logger = logging.getLogger(__name__)

GO_ON = "run the same command with --resume"


def checkpoint_to_resume(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that has all its parts, after a look at each of them.

    Newer ones that lack a part, which a killed run may leave, are passed over with a warning.
    """
    newest = last_checkpoint(output_dir)
    if newest is None:
        return None
    for passed in numbered_checkpoints(output_dir):
        if step_of(passed) > step_of(newest):
            logger.warning("%s lacks %s; going on from %s", passed, missing_part(passed), newest.name)
    with reading_checkpoint(newest):
        tensors = sorted([*newest.glob("*.safetensors"), *newest.glob("*.pt"), *newest.glob("rng_state*.pth")])
        for path in (newest / "trainer_state.json", *tensors):
            try:
                _check_file(path)
            except Exception as error:
                raise ValueError(f"{path.name} cannot be read ({in_one_line(error)})") from None
    return newest


def _check_file(path: Path) -> None:
    """Read the structure of a checkpoint's file, not the values of its tensors."""
    if path.suffix == ".json":
        TrainerState.load_from_json(str(path))
    elif path.suffix == ".safetensors":
        # Opening compares the size of the file with its header.
        with safe_open(path, "pt"):
            pass
    elif path.suffix == ".pt":
        torch.load(path, map_location="meta", weights_only=True)
    # Random states have types of numpy, which Trainer allows.
    elif not zipfile.is_zipfile(path):
        raise ValueError("it is cut or overwritten")


@contextmanager
def writing(what: str, output_dir: Path) -> Iterator[None]:
    """Turn an error of the block, such as a full disk, into a StoppedError that names the run's last checkpoint.

    ``what`` is written, such as ``a/model: the finished model``.
    """
    try:
        yield
    # torch, safetensors and tokenizers raise other errors than OSError for a full disk.
    except Exception as error:
        if isinstance(error, UserError | StoppedError | torch.OutOfMemoryError) or lost_contact(error):
            raise
        saved = last_checkpoint(output_dir) or "none yet"
        raise StoppedError(
            f"{what} could not be written ({in_one_line(error)}); last good checkpoint: {saved}",
            f"Mend that and {GO_ON}",
        ) from error


@contextmanager
def reading_checkpoint(checkpoint: Path | str | None, best: bool = False) -> Iterator[None]:
    """Let an error of the block, which reads a checkpoint, say how to go on without it.

    With None as checkpoint, errors stay as they are; ``best`` says that it is read at the end, as the best one.
    """
    try:
        # Trainer would pass over a best one without weights.
        if best and (missing := missing_part(Path(checkpoint))) is not None:
            raise ValueError(f"it lacks {missing}")
        yield
    except Exception as error:
        others = (UserError, StoppedError, OSError, MemoryError, torch.OutOfMemoryError)
        # Libraries can raise any other exception on a damaged file.
        if checkpoint is None or isinstance(error, others) or lost_contact(error):
            raise
        checkpoint = Path(checkpoint)
        before = [each for each in checkpoints(checkpoint.parent) if step_of(each) < step_of(checkpoint)]
        what = "is the best checkpoint, but cannot be read" if best else "cannot be resumed from"
        goal = "end in the last one" if best else f"go on from {before[-1].name}" if before else None
        remedy = f"move that folder elsewhere and {GO_ON} to {goal}"
        if goal is None:
            remedy = "no other checkpoint is before it: start again with another output_dir"
        raise OutputError(f"{checkpoint}: {what}: {in_one_line(error)}", remedy) from error


def apply_schedule(scheduler: Any, optimizer: torch.optim.Optimizer, options: Sequence[dict[str, Any]]) -> None:
    """Set the learning rates to those that the stage's schedule has at the step of the checkpoint.

    One that follows a metric has no such rates: a stage cannot change it (:mod:`training.stages.continuation`).
    """
    groups = optimizer.param_groups
    if not isinstance(scheduler, LambdaLR) or len(groups) != len(options):
        return
    scheduler.base_lrs = [own["lr"] for own in options]
    factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
    for group, base, factor in zip(groups, scheduler.base_lrs, factors, strict=True):
        group["initial_lr"], group["lr"] = base, base * factor
    scheduler._last_lr = [group["lr"] for group in groups]


def follow_arguments(state: TrainerState, args: TrainingArguments, checkpoint: Path) -> None:
    """Let a training state that was read from a checkpoint follow the stage as it is now."""
    if state.global_step > state.max_steps:
        raise OutputError(
            f"{checkpoint}: is of step {step_of(checkpoint)}, but the stage now ends at step {state.max_steps}",
            f"undo the change, or start again from 'model: {checkpoint}' with another output_dir",
        )
    state.compute_steps(args, state.max_steps)
    before = read_json(checkpoint / "training_arguments.json")
    same = all(before.get(key) == getattr(args, key) for key in ("metric_for_best_model", "greater_is_better"))
    if not same and state.best_metric is not None:
        logger.warning("another metric chooses the best model: it is looked for from step %d on", state.global_step)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        state.stateful_callbacks.pop(EarlyStopping.__name__, None)
