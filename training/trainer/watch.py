"""Records anomalies of steps with their rows: loss spikes, and non-finite losses or gradients."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training.data.prepared import PreparedSource

logger = logging.getLogger(__name__)

NOTES = "spikes.jsonl"
# A loss is compared with this many losses of its source before it, and only once there are the fewest.
_WINDOW, _FEWEST = 100, 20
# Losses that hardly differ, as a part of their mean: a rounding above them is not a spike.
_LEAST_DEVIATION = 0.01
_ROWS, _CHARACTERS = 5, 300


class StepWatch:
    """Writes a line to ``spikes.jsonl`` in the run's folder for every step with an anomaly.

    A loss spikes when it lies more than ``factor`` standard deviations above the mean of the last losses of its source.
    The rows are ranked by the gradient that their texts received. Only a process that ``writes`` writes.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[PreparedSource],
        tokenizer: PreTrainedTokenizerBase,
        factor: float = 6.0,
        writes: bool = True,
    ) -> None:
        self.path = folder / NOTES
        self.factor = factor
        self._sources = {source.name: source for source in sources}
        self._tokenizer = tokenizer
        self._writes = writes
        self._losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))

    def loss(self, step: int, batch: Mapping[str, Any], loss: float, gradients: Tensor) -> None:
        """Look at the loss of a step; ``gradients`` are the ``(n,)`` norms of those of the batch's embeddings."""
        before = self._losses[batch["source"]]
        if len(before) >= _FEWEST:
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if loss > mean + self.factor * max(deviation, _LEAST_DEVIATION * abs(mean)):
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
        of_row = scores[batch["query"]] + scores[batch["positive"]] + scores[batch["negatives"]].sum(dim=1)
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
