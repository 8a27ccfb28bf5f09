"""How many rows of the published 16 a step of stock Qwen3 can take on this machine."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.hardware import available_memory
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.settings import Settings
from tests.benchmarks.texts import batches, row_lengths
from tests.benchmarks.timing import time_call

__all__ = ["PUBLISHED_ROWS", "choose_rows"]

PUBLISHED_ROWS = 16
_MOST_SECONDS = 120.0
# What is kept for the backward pass is not all that a step needs, and the machine is not ours alone.
_MEMORY_SHARE = 0.75


@lru_cache
def choose_rows(settings: Settings) -> tuple[int, str]:
    """Rows of the batch and a sentence that says why.

    Unless the command line names them, they are the published 16, or the largest of 8, 4, 2 and 1 whose step on stock
    Qwen3 stays under two minutes in fp32 and fits into memory, both extrapolated from one row by padded tokens.
    """
    if settings.rows is not None:
        return settings.rows, f"Rows: {settings.rows}, as asked for (published: {PUBLISHED_ROWS} per device)."
    if settings.quick:
        return 2, "Rows: 2, a quick run."
    padded = {rows: batches(row_lengths(settings, rows))[1] for rows in (16, 8, 4, 2, 1)}
    tokens = {rows: batch["input_ids"].numel() for rows, batch in padded.items()}
    seconds, kept = _probe(settings, padded[1])
    limit = _MEMORY_SHARE * (available_memory() or math.inf)
    for rows in padded:
        scale = tokens[rows] / tokens[1]
        if (seconds * scale <= _MOST_SECONDS and kept * scale <= limit) or rows == 1:
            break
    scale = tokens[PUBLISHED_ROWS] / tokens[1]
    why = (
        f"Rows: {rows} (published: {PUBLISHED_ROWS} per device). A stock fp32 step on {PUBLISHED_ROWS} would take "
        f"about {seconds * scale:.0f} s and keep about {kept * scale / 2**30:.1f} GiB for its backward pass; limits: "
        f"{_MOST_SECONDS:.0f} s and {limit / 2**30:.1f} GiB."
    )
    return rows, why


def _probe(settings: Settings, batch: dict[str, Any]) -> tuple[float, int]:
    """Seconds of a step of stock Qwen3 on one row and the bytes that it keeps for the backward pass."""
    model = build_models(configuration(settings, **settings.step_shape))[0]["stock"].train()
    kept: dict[int, int] = {}
    # What is kept includes the weights, which are there anyway.
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            kept[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward_backward(model, batch)
    seconds, _ = time_call(lambda: _forward_backward(model, batch))
    return seconds, sum(kept.values())


def _forward_backward(model: nn.Module, batch: dict[str, Any]) -> None:
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    hidden.square().mean().backward()
    model.zero_grad()
