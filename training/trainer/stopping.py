"""Ends of a training before its last step: signals, and evaluations without improvement."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Thread
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let either signal end the block with a KeyboardInterrupt whose argument is the signal's number."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    with _handled_by(end):
        yield


class Interruption(TrainerCallback):
    """Watches for signals in the block of :meth:`watching`; as a Trainer's callback, stops the training after the step.

    A signal to one process stops all of them at the same step; ``signal`` is then its number. A second SIGINT ends the
    process at once; another SIGTERM does not: schedulers send it to a launcher and its processes, and launchers pass
    it on.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.signal: int | None = None
        self._accelerator = accelerator
        self._received = 0

    def watching(self) -> AbstractContextManager[None]:
        """Watch for signals until the block ends."""
        return _handled_by(self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self._received = number

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end if any process has received a signal."""
        self.signal = self.received()
        if self.signal and state.global_step < state.max_steps:
            control.should_training_stop = True
            # The sender may not wait for long: only what decides by evaluations needs every one.
            control.should_evaluate &= args.metric_for_best_model is not None
            control.should_save = not _decides_at_epoch_end(args, state)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the end of an interrupted epoch from being taken for the end of an epoch."""
        if self.signal and state.global_step < state.max_steps:
            control.should_save = _decides_at_epoch_end(args, state)
            control.should_evaluate &= control.should_save

    def received(self) -> int | None:
        """Return the signal that any process has received; every process must ask at the same point."""
        if self._accelerator.num_processes == 1:
            return self._received or None
        received = torch.tensor([self._received], device=self._accelerator.device)
        return int(self._accelerator.gather(received).max()) or None


def _decides_at_epoch_end(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether this step ends an epoch at whose end an evaluation decides: the checkpoint must come after it."""
    decides = args.metric_for_best_model is not None and args.eval_strategy == "epoch"
    return decides and float(state.epoch).is_integer()


def outlive_signals(worker: int) -> None:
    """Let a loader worker outlive signals to the whole process group; a SIGTERM from the trainer still ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_end() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    # macOS does not tell who sent a signal.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=wait_for_end, daemon=True).start()


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count a resumed run takes from its checkpoint.

    Trainer could restore it, but also the order to stop that ended an interrupted run.
    """

    _begun_at = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the count of a resumed run from its state; one that had been stopped trains no further."""
        super().on_train_begin(args, state, control, **kwargs)
        # A checkpoint of a run without early stopping holds nothing; Trainer wants an entry to replace.
        counted = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = counted["attributes"]["early_stopping_patience_counter"]
        self._begun_at = state.global_step
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any, **kwargs: Any) -> None:
        """Count the evaluation, other than one that `eval_on_start` repeats after an interruption."""
        if state.global_step > self._begun_at:
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Log why the training ended, if this is why."""
        counter = self.early_stopping_patience_counter
        if counter >= self.early_stopping_patience and state.global_step < state.max_steps:
            logger.info(
                "early stopping at step %d of %d: %d evaluations did not improve %s; the best is step %s",
                *(state.global_step, state.max_steps, counter, args.metric_for_best_model, state.best_global_step),
            )
