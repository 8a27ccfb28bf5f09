"""How far a training went, and what its last evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.common.run_folder import FINAL_MODEL, last_checkpoint
from training.models.model_ref import MERGED_ADAPTER
from training.publishing.states import ModelState, read_json

STATE = "trainer_state.json"
# Endings of metrics that measure the machine, not the model.
TIMING = ("_runtime", "_per_second", "_preparation_time")


@dataclass(frozen=True)
class Progress:
    """How far a training went: optimizer steps and epochs, None if the run's log is gone."""

    steps: int | None = None
    epochs: float | None = None
    # Of the last evaluation, by Trainer's name, and train_loss, the mean loss of the last logged steps.
    metrics: Mapping[str, float] = field(default_factory=dict)


def progress_of(state: ModelState) -> Progress:
    """Return what a run's log says of one of its models.

    The finished model is that of the last step, or of the best evaluated one with ``load_best_model_at_end``. Nothing
    is known of it without the checkpoint of the last step.
    """
    trained = _trainer_state(state)
    if trained is None:
        return Progress()
    step = trained["global_step"]
    if state.folder.name == FINAL_MODEL and state.keys.get("load_best_model_at_end"):
        step = trained["best_global_step"] or step
    history = [entry for entry in trained["log_history"] if entry["step"] <= step]
    epochs = history[-1]["epoch"] if history and history[-1]["step"] == step else trained["epoch"]
    evaluated = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    metrics = {key: value for key, value in evaluated.items() if key.startswith("eval_") and not key.endswith(TIMING)}
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return Progress(step, epochs, {**metrics, "train_loss": losses[-1]} if losses else metrics)


def _trainer_state(state: ModelState) -> dict[str, Any] | None:
    folder = state.folder
    if (folder / MERGED_ADAPTER).is_file():
        # The base merged with the run's adapter, or with one of its checkpoints.
        folder = state.run / Path(read_json(folder / MERGED_ADAPTER)["adapter"]["name"]).name
    # A checkpoint may be kept outside its run.
    checkpoint = last_checkpoint(state.run) if folder.name == FINAL_MODEL else folder
    if checkpoint is None:
        return None
    trained = read_json(checkpoint / STATE)
    ended = trained["global_step"] >= trained["max_steps"] or state.keys.get("early_stopping_patience") is not None
    return trained if ended or folder is checkpoint else None
