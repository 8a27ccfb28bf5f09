"""Going on from a checkpoint: whether it is whole, and what the stage may have changed since it was written."""

from __future__ import annotations

import json
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
from training.trainer.stopping import EarlyStopping

logger = logging.getLogger(__name__)

# Averages that have the shape of their weights, in all optimizers that keep them.
_AVERAGES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


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
        state = TrainerState.load_from_json(str(path))
        if state.global_step != step_of(path.parent) or not isinstance(state.log_history, list):
            raise ValueError(f"it is of step {state.global_step!r}")
        if not isinstance(state.stateful_callbacks, dict):
            raise TypeError("it holds no states of callbacks")
    elif path.suffix == ".safetensors":
        # Opening compares the size of the file with its header.
        with safe_open(path, "pt"):
            pass
    elif not zipfile.is_zipfile(path):
        raise ValueError("it is cut or overwritten")
    # Random states have types of numpy; Trainer reads them.
    elif path.suffix == ".pt":
        content = torch.load(path, map_location="meta", weights_only=True)
        if path.name == "optimizer.pt" and not content["param_groups"]:
            raise ValueError("it holds no parameters")


@contextmanager
def reading_checkpoint(checkpoint: Path | str | None, best: bool = False) -> Iterator[None]:
    """Let an error of the block, which reads a checkpoint, say how to go on without it.

    Args:
        checkpoint: The checkpoint to go on from; with None, errors stay as they are.
        best: Whether it is read at the end, as the best one.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint)
    try:
        # Trainer would pass over a best one without weights.
        if best and (missing := missing_part(checkpoint)) is not None:
            raise ValueError(f"it lacks {missing}")
        yield
    except Exception as error:
        others = (UserError, StoppedError, OSError, MemoryError, torch.OutOfMemoryError)
        # Libraries can raise any other exception on a damaged file.
        if checkpoint is None or isinstance(error, others) or lost_contact(error):
            raise
        move = "move that folder elsewhere and run the same command with --resume to"
        before = [each for each in checkpoints(checkpoint.parent) if step_of(each) < step_of(checkpoint)]
        if best:
            what, remedy = "is the best checkpoint, but cannot be read", f"{move} end in the last one"
        elif before:
            what, remedy = "cannot be resumed from", f"{move} go on from {before[-1].name}"
        else:
            remedy = "no other checkpoint is before it: start again with another output_dir"
            what = "cannot be resumed from"
        raise OutputError(f"{checkpoint}: {what}: {in_one_line(error)}", remedy) from error


def apply_schedule(scheduler: Any, optimizer: torch.optim.Optimizer, options: Sequence[dict[str, Any]]) -> None:
    """Set the learning rates to those that the stage's schedule has at the step of the checkpoint.

    A schedule that is a function of the step gives the same value again where nothing was changed. One that follows a
    metric has no such value: a stage cannot change it (:mod:`training.stages.continuation`).
    """
    groups = optimizer.param_groups
    if not isinstance(scheduler, LambdaLR) or len(groups) != len(options) or any("lr" not in own for own in options):
        return
    scheduler.base_lrs = [own["lr"] for own in options]
    factors = [function(scheduler.last_epoch) for function in scheduler.lr_lambdas]
    rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, base, rate in zip(groups, scheduler.base_lrs, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    scheduler._last_lr = rates


def check_loaded(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if an optimizer's state is not that of its weights."""
    # Out of accelerate's wrapping.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for group in optimizer.param_groups:
        for weights in group["params"]:
            state = optimizer.state.get(weights, {})
            for average in (state.get(name) for name in _AVERAGES):
                if torch.is_tensor(average) and average.shape != weights.shape:
                    shapes = f"{tuple(average.shape)}, not {tuple(weights.shape)}"
                    raise ValueError(f"the optimizer's state is that of other weights: a shape is {shapes}")
            if "betas" in group and "exp_avg" not in state and type(optimizer).__name__ == "AdamW":
                raise ValueError("the optimizer's state lacks that of some weights")


def follow_arguments(state: TrainerState, args: TrainingArguments, checkpoint: Path) -> None:
    """Let a training state that was read from a checkpoint follow the stage as it is now."""
    if state.global_step > state.max_steps:
        raise OutputError(
            f"{checkpoint}: is of step {step_of(checkpoint)}, but the stage now ends at step {state.max_steps}",
            f"undo the change, or start again from 'model: {checkpoint}' with another output_dir",
        )
    state.compute_steps(args, state.max_steps)
    try:
        before = json.loads((checkpoint / "training_arguments.json").read_text(encoding="utf-8"))
        same = all(before[key] == getattr(args, key) for key in ("metric_for_best_model", "greater_is_better"))
    # Written for people; nothing else depends on it.
    except (OSError, ValueError, KeyError, TypeError):
        return
    if not same and state.best_metric is not None:
        logger.warning("another metric chooses the best model: it is looked for from step %d on", state.global_step)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        state.stateful_callbacks.pop(EarlyStopping.__name__, None)
