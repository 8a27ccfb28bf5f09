"""SIGTERM and SIGINT end a training in good order: the step is finished and a checkpoint written."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A block that either signal ends with a KeyboardInterrupt whose argument is the signal's number."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    previous = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Interruption(TrainerCallback):
    """Watches for signals inside a ``with`` block; as a Trainer's callback, stops the training after the step.

    A signal to one process stops all of them at the same step. A second SIGINT ends the process at once; another
    SIGTERM does not, for schedulers send it to a launcher and its processes alike, and launchers pass it on.

    Attributes:
        signal: Number of the signal that stopped the training, None if none did.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.signal: int | None = None
        self._accelerator = accelerator
        self._received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)
        self._received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint and the end if any process has received a signal."""
        self.signal = self.received()
        if self.signal and state.global_step < state.max_steps:
            control.should_training_stop = True
            # Whoever sent the signal may not wait for long; only what decides by evaluations needs every one.
            control.should_evaluate = control.should_evaluate and _decides(args)
            control.should_save = not _decides_at_epoch_end(args, state)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Keeps the end of an interrupted epoch from being taken for the end of an epoch."""
        if self.signal and state.global_step < state.max_steps:
            control.should_save = _decides_at_epoch_end(args, state)
            control.should_evaluate = control.should_evaluate and control.should_save
        return control

    def received(self) -> int | None:
        """The signal that any process has received; every process must ask at the same point."""
        if self._accelerator.num_processes == 1:
            return self._received or None
        received = torch.tensor([self._received], device=self._accelerator.device)
        return int(self._accelerator.gather(received).max()) or None


def _decides(args: TrainingArguments) -> bool:
    """Whether evaluations choose the best model, the end of the training or the learning rate."""
    return args.metric_for_best_model is not None


def _decides_at_epoch_end(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether this step ends an epoch at whose end an evaluation decides: the checkpoint must come after it."""
    by_epoch = _decides(args) and args.eval_strategy == IntervalStrategy.EPOCH
    return by_epoch and float(state.epoch).is_integer()


def outlive_signals(worker: int) -> None:
    """Lets a loader worker outlive signals that reach the whole process group; the trainer decides when to end.

    A SIGTERM from the trainer itself still ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # macOS does not tell who sent a signal.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
