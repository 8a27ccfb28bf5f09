"""The training log for people: one aligned line per log step and evaluation."""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainerCallback, TrainerState

logger = logging.getLogger("training")


class Console(TrainerCallback):
    """Log a line per log step and evaluation, by the ``training`` logger; on a terminal, show a progress bar below.

    Each of the loss's ``terms`` has a column. Losses by source and scores by width are left to TensorBoard and the JSON
    log. Use it as a context manager around the training, which removes the bar at the end or after an error.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.terms = list(terms)
        self._stack = ExitStack()
        self._bar: tqdm | None = None
        self._first_step = self._tokens = 0
        self._started = self._mark = self._seconds = 0.0

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._bar = None

    def count(self, tokens: int) -> None:
        """Count the tokens of a global batch, which all processes together encode in a step."""
        self._tokens += tokens

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock, and the bar where there is a terminal."""
        self._started = self._mark = time.perf_counter()
        self._first_step, self._tokens, self._seconds = state.global_step, 0, 0.0
        terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        if state.is_world_process_zero and not args.disable_tqdm and terminal:
            bar = tqdm(total=state.max_steps, initial=state.global_step, leave=False, dynamic_ncols=True)
            self._bar = self._stack.enter_context(bar)
            self._stack.enter_context(logging_redirect_tqdm())

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure the step, with the wait for its batch."""
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Leave the time of an evaluation or a checkpoint out of the speed of steps."""
        self._mark = time.perf_counter()

    on_save = on_evaluate

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        """Log the line of a log step or an evaluation."""
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            each = (time.perf_counter() - self._started) / max(state.global_step - self._first_step, 1)
            speed = self._tokens / self._seconds if self._seconds else math.nan
            logger.info("%s", step_line(logs, self.terms, state, speed, each * (state.max_steps - state.global_step)))
            self._tokens, self._seconds = 0, 0.0
        elif any(name.startswith("eval_") for name in logs):
            logger.info("%s", evaluation_line(logs, state))


def step_line(logs: Mapping[str, float], terms: Sequence[str], state: TrainerState, speed: float, left: float) -> str:
    """Return the line of a log step; ``speed`` is in tokens per second over all processes, ``left`` in seconds."""
    parts = [_step(state), f"loss {logs['loss']:8.4f}"]
    parts += [f"{term.replace('_', '-')} {logs.get(f'loss_{term}', math.nan):8.4f}" for term in terms]
    parts += [f"lr {logs['learning_rate']:.2e}", f"grad {logs.get('grad_norm', math.nan):7.3g}"]
    parts += [f"{speed:9,.0f} tokens/s", f"{peak_memory() / 2**30:6.2f} GiB"]
    return "  ".join([*parts, f"{timedelta(seconds=round(left))} left"]).replace("nan", "  –")


def evaluation_line(logs: Mapping[str, float], state: TrainerState) -> str:
    """Return the line of an evaluation: the losses by task type, and the scores of pairs at full width."""
    named = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    shown = {name: value for name, value in named.items() if "/" not in name and "_dim" not in name}
    first = {"loss": shown.pop("loss")} if "loss" in shown else {}
    parts = [f"{name.replace('_', ' ')} {value:8.4f}" for name, value in {**first, **shown}.items()]
    return "  ".join([f"{_step(state)}  validation", *parts])


def _step(state: TrainerState) -> str:
    last = f"{state.max_steps:,}"
    return f"step {state.global_step:>{len(last)},}/{last}"


def peak_memory() -> int:
    """Return the most bytes that were in use: on the GPU if there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
