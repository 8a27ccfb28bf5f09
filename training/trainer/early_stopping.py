"""Early stopping that a resumed run goes on with, and that says why the training ended."""

from __future__ import annotations

import logging
from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping; what it has counted is kept in the checkpoints and taken up again from them.

    Trainer itself could restore it, but with it the order to stop that ended an interrupted run.

    Args:
        early_stopping_patience: Evaluations in a row without improvement that end the training.
        early_stopping_threshold: What a change must exceed to be an improvement.
    """

    def __init__(self, early_stopping_patience: int, early_stopping_threshold: float = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self._begun_at = 0

    @property
    def reached(self) -> bool:
        """Whether the patience is at its end."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Takes up what a continued run has counted; one that had been stopped trains no further."""
        super().on_train_begin(args, state, control, **kwargs)
        # A checkpoint of a run that knew no early stopping holds nothing; Trainer wants an entry to replace.
        counted = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = counted["attributes"]["early_stopping_patience_counter"]
        self._begun_at = state.global_step
        control.should_training_stop = control.should_training_stop or self.reached
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Counts the evaluation and asks for the end."""
        # `eval_on_start` repeats what was counted before an interruption.
        if state.global_step > self._begun_at:
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says why the training ended, if this is why."""
        if self.reached and state.global_step < state.max_steps:
            logger.info(
                "early stopping at step %d of %d: %d evaluations in a row did not improve %s by more than %g; the best "
                "was %.4f at step %s",
                *(state.global_step, state.max_steps, self.early_stopping_patience_counter),
                *(args.metric_for_best_model, self.early_stopping_threshold, state.best_metric),
                state.best_global_step,
            )
