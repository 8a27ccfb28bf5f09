"""How far the training of a model went, and what its last evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.common.run_folder import FINAL_MODEL, last_checkpoint
from training.models.adapter_folder import MERGED_ADAPTER
from training.publishing.states import ModelState, read_json

STATE = "trainer_state.json"
# Ends of keys: what an evaluation took says nothing of the model.
TIMING = ("_runtime", "_per_second", "_preparation_time")


@dataclass(frozen=True)
class Progress:
    """How far a training went.

    Attributes:
        steps: Optimizer steps done; None if the run no longer tells.
        epochs: Epochs done; None if it no longer tells.
        metrics: Of the last evaluation, by Trainer's name, and ``train_loss``, the mean loss of the last logged steps.
    """

    steps: int | None = None
    epochs: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def progress_of(state: ModelState) -> Progress:
    """What the log of a run says of one of its states.

    The finished model of a run is that of its last step, or of the best evaluated one if the recipe says so. Without
    the checkpoint of the last step, nothing is known of it.
    """
    trained = _trainer_state(state)
    if trained is None:
        return Progress()
    step, history = trained["global_step"], trained["log_history"]
    if state.folder.name == FINAL_MODEL and state.keys.get("load_best_model_at_end") and trained["best_global_step"]:
        step = trained["best_global_step"]
    history = [entry for entry in history if entry["step"] <= step]
    epochs = history[-1]["epoch"] if history and history[-1]["step"] == step else trained["epoch"]
    evaluated = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    metrics = {key: value for key, value in evaluated.items() if key.startswith("eval_") and not key.endswith(TIMING)}
    logged = next((entry["loss"] for entry in reversed(history) if "loss" in entry), None)
    return Progress(step, epochs, metrics if logged is None else {**metrics, "train_loss": logged})


def _trainer_state(state: ModelState) -> dict[str, Any] | None:
    # A checkpoint may be kept elsewhere than in its run.
    name, kept = state.folder.name, state.folder.parent
    if (state.folder / MERGED_ADAPTER).is_file():
        # The base with what the run made, its model or a checkpoint.
        name = Path(read_json(state.folder / MERGED_ADAPTER)["adapter"]["name"]).name
        kept = state.run
    if name != FINAL_MODEL:
        return read_json(kept / name / STATE)
    checkpoint: Path | None = last_checkpoint(state.run)
    if checkpoint is None:
        return None
    trained = read_json(checkpoint / STATE)
    ended = trained["global_step"] >= trained["max_steps"] or state.keys.get("early_stopping_patience") is not None
    return trained if ended else None
