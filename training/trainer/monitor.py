"""What a training reports while it runs: aligned lines for people, and the rows of steps with anomalies."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from training.data.prepared import PreparedSource

logger = logging.getLogger("training")

NOTES = "spikes.jsonl"
# A loss is compared with this many losses of its source before it, and only once there are the fewest.
_WINDOW, _FEWEST = 100, 20
# A spike lies so many standard deviations above their mean. Where they hardly differ, a deviation is taken as a part of
# the mean: a rounding above them is not a spike.
_FACTOR, _LEAST_DEVIATION = 6.0, 0.01
_ROWS, _CHARACTERS = 5, 300


class Console(ExitStack, TrainerCallback):
    """Log a line per log step and evaluation, by the ``training`` logger; on a terminal, show a progress bar below.

    Each of the loss's ``terms`` has a column. Losses by source and scores by width are left to TensorBoard and the JSON
    log. Use it as a context manager around the training, which removes the bar at the end or after an error.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        super().__init__()
        self.terms, self._bar = list(terms), tqdm(disable=True)
        self._first_step = self._tokens = 0
        self._started = self._mark = self._seconds = 0.0

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
            self._bar = self.enter_context(bar)
            self.enter_context(logging_redirect_tqdm())

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure the step, with the wait for its batch."""
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._bar.update()

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
    parts += [f"masked {logs['masked_candidates']:6.2%}"] if "masked_candidates" in logs else []
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


def reset_peak_memory() -> None:
    """Forget the peak so far, where that can be done: on a GPU, and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")


class StepWatch:
    """Writes a line to ``spikes.jsonl`` in the run's folder for every step with an anomaly; its rows are ranked.

    A loss spikes when it lies more than six standard deviations above the mean of the last losses of its source.
    """

    def __init__(
        self, folder: Path, sources: Sequence[PreparedSource], tokenizer: PreTrainedTokenizerBase, writes: bool = True
    ) -> None:
        self.path = folder / NOTES
        self._sources = {source.name: source for source in sources}
        self._tokenizer = tokenizer
        self._writes = writes
        self._losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))

    def loss(self, step: int, batch: Mapping[str, Any], loss: float, gradients: Tensor) -> None:
        """Look at the loss of a step; ``gradients`` are the ``(n,)`` norms of those of the batch's embeddings."""
        before = self._losses[batch["source"]]
        if len(before) >= _FEWEST:
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if loss > mean + _FACTOR * max(deviation, _LEAST_DEVIATION * abs(mean)):
                self.record("loss spike", step, batch, gradients, loss=loss, mean=mean, deviation=deviation)
        before.append(loss)

    def record(self, kind: str, step: int, batch: Mapping[str, Any], scores: Tensor, **numbers: float) -> None:
        """Write down a step, its rows, and the texts of those with the highest ``(n,)`` scores of their texts."""
        if not self._writes:
            return
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        logger.warning(
            "%s at step %d in source %r (%s); its rows are in %s", kind, step, batch["source"], shown, self.path
        )
        entry = {
            **{"kind": kind, "step": step, "source": batch["source"]},
            **{name: _json(value) for name, value in numbers.items()},
            **{"rows": batch["rows"], "worst": self._worst(batch, scores)},
        }
        try:
            with self.path.open("a", encoding="utf-8") as notes:
                notes.write(json.dumps(entry, ensure_ascii=False) + "\n")
        # A note that cannot be written must not end the training.
        except OSError as error:
            logger.warning("%s: could not be written (%s)", self.path, error)

    def _worst(self, batch: Mapping[str, Any], scores: Tensor) -> list[dict[str, Any]]:
        # What is not finite outweighs everything.
        scores = torch.nan_to_num(scores.float(), nan=math.inf, posinf=math.inf)
        of_negatives = torch.where(batch["negatives"] < 0, 0.0, scores[batch["negatives"]]).sum(dim=1)
        of_row = scores[batch["query"]] + scores[batch["positive"]] + of_negatives
        source = self._sources[batch["source"]]
        worst = []
        for index in of_row.argsort(descending=True, stable=True)[:_ROWS].tolist():
            row = batch["rows"][index]
            texts = [source.tokens(int(text)).tolist() for text in source.rows["train"][row][:2]]
            query, passage = (self._tokenizer.decode(each, skip_special_tokens=True)[:_CHARACTERS] for each in texts)
            worst.append({"row": row, "score": _json(float(of_row[index])), "query": query, "passage": passage})
        return worst


def _json(number: float) -> float | str:
    """Return a number as strict JSON has it."""
    return number if math.isfinite(number) else str(number)
