"""Trainings in processes of their own, to be sent signals, killed, and run out of room.

A process is forked from that of the tests, which has everything imported: it starts in milliseconds.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.run_stage import main

_CONTEXT = multiprocessing.get_context("fork")
_PLACES = {
    "setup": ("training.stages.setup", "set_seed"),
    "step": ("training.trainer.trainer", "F2LLMTrainer.training_step"),
    "evaluation": ("training.trainer.trainer", "F2LLMTrainer.evaluate"),
    "checkpoint": ("training.trainer.saving", "publish"),
    "finish": ("training.stages.stage", "_save"),
}


class SignalAt(NamedTuple):
    """A signal that a training sends itself, or its process group, at the nth time (from 0) that it gets to a place."""

    place: str
    nth: int
    number: int
    group: bool = False


class Run:
    """A training that has been started; its output is in ``log``."""

    def __init__(self, words: Sequence[str], log: Path, signals: Sequence[SignalAt], file_size: int | None) -> None:
        self.log = log
        self._process = _CONTEXT.Process(target=_train, args=(list(words), log, list(signals), file_size))
        self._process.start()

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def line(self) -> str:
        """What it said in the end, which must be its only complaint."""
        assert "Traceback" not in self.output, self.output
        complaints = [line for line in self.output.splitlines() if line.startswith(("error: ", "stopped: "))]
        assert len(complaints) == 1 and self.output.rstrip().endswith(complaints[0]), self.output
        return complaints[0]

    def wait(self, timeout: float = 120) -> int:
        """Its exit status, negative if a signal killed it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(self.output)
        return self._process.exitcode

    def wait_for(self, condition: Callable[[], Any], timeout: float = 120) -> bool:
        """Whether the condition came true before the training ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self._process.is_alive():
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.output)
            time.sleep(0.001)
        return True

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.join()


def start(words: Sequence[object], folder: Path, signals: Sequence[SignalAt] = (), file_size: int | None = None) -> Run:
    """Starts ``run_stage.py`` with these words; a file that outgrows ``file_size`` bytes finds the disk full."""
    number = len(list(folder.glob("*.log")))
    return Run([str(word) for word in words], folder / f"{number}.log", signals, file_size)


def _train(words: list[str], log: Path, signals: list[SignalAt], file_size: int | None) -> None:
    os.setsid()
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    logging.getLogger().handlers.clear()
    for place, (module, name) in _PLACES.items():
        due = [signal for signal in signals if signal.place == place]
        if due:
            _patch(importlib.import_module(module), name, due)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(main(words))


def _send(signal: SignalAt) -> None:
    if signal.group:
        # From outside of the group: loader workers know a signal of the trainer's own.
        command = ["kill", f"-{int(signal.number)}", "--", f"-{os.getpid()}"]
        subprocess.run(command, start_new_session=True, check=True)
    else:
        os.kill(os.getpid(), signal.number)


def _patch(owner: Any, name: str, signals: list[SignalAt]) -> None:
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def sending(*args: Any, **kwargs: Any) -> Any:
        for signal in signals:
            if signal.nth == len(calls):
                _send(signal)
        calls.append(None)
        return original(*args, **kwargs)

    setattr(owner, name, sending)
