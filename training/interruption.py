"""SIGTERM and SIGINT end a training in good order: the step is finished and a checkpoint written."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Interruption", "ignore_interrupts"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption(TrainerCallback):
    """Watches for signals inside a ``with`` block; as a Trainer's callback, stops the training after the step.

    A signal to one process stops all of them at the same step. A second signal ends the process at once.

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
        if self._received:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)
        self._received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint and the end if any process has received a signal."""
        self.signal = self._agreed() or None
        if self.signal and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            # Whoever sent the signal may not wait for long.
            control.should_evaluate = False
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Keeps the end of an interrupted epoch from being taken for the end of an epoch."""
        if self.signal and state.global_step < state.max_steps:
            control.should_save = control.should_evaluate = False
        return control

    def _agreed(self) -> int:
        """The signal that any process has received; every process must ask at the same step."""
        if self._accelerator.num_processes == 1:
            return self._received
        received = torch.tensor([self._received], device=self._accelerator.device)
        return int(self._accelerator.gather(received).max())


def ignore_interrupts(worker: int) -> None:
    """Lets a loader worker outlive a Ctrl-C that reaches the whole process group; the trainer decides when to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
