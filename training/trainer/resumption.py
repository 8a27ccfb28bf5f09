"""What a continued training takes from its stage instead of from its checkpoint: all that the stage may change."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, TrainingArguments

from training.common.errors import OutputError
from training.common.run_folder import step_of
from training.trainer.early_stopping import EarlyStopping

logger = logging.getLogger(__name__)

# Averages that have the shape of their weights, in all optimizers that keep them.
_AVERAGES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def apply_schedule(scheduler: Any, optimizer: torch.optim.Optimizer, options: Sequence[dict[str, Any]]) -> None:
    """Sets the learning rates to those that the stage's schedule has at the step of the checkpoint.

    A schedule that is a function of the step alone gives the same value again where nothing was changed. One that
    follows a metric has no such value: a stage cannot change it (:mod:`training.stages.continuation`).
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
    """Makes sure that an optimizer's state is one of its weights.

    Raises:
        ValueError: If it is of other ones.
    """
    # Out of accelerate's wrapping.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for group in optimizer.param_groups:
        for weights in group["params"]:
            state = optimizer.state.get(weights, {})
            for name in _AVERAGES:
                average = state.get(name)
                if torch.is_tensor(average) and average.shape != weights.shape:
                    shapes = f"{tuple(average.shape)}, not {tuple(weights.shape)}"
                    raise ValueError(f"the optimizer's state is that of other weights: a shape is {shapes}")
            if "betas" in group and "exp_avg" not in state and type(optimizer).__name__ == "AdamW":
                raise ValueError("the optimizer's state lacks that of some weights")


def follow_arguments(state: TrainerState, args: TrainingArguments, checkpoint: Path) -> None:
    """Lets a training state that was read from a checkpoint follow the stage as it is now.

    Raises:
        OutputError: If the checkpoint lies beyond the end of the stage.
    """
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
