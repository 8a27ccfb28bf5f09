"""A training step: forward, in-batch and hard losses under matryoshka, backward, AdamW.

Each row has a query, a positive and seven hard negatives, as long as those of the published training. Stock Qwen3 gets
them as the released training code gives them: in one batch, padded to one length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.machine import PRECISIONS, Settings, available_memory, device
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.texts import batches, row_lengths
from tests.benchmarks.timing import Contestant, Suite, add_ratio, measure, time_call
from training.models.encoding import embed_chunk
from training.trainer.step import Objective

PUBLISHED_ROWS = 16
_MOST_SECONDS = 120.0
# What is kept for the backward pass is not all that a step needs, and the machine is not ours alone.
_MEMORY_SHARE = 0.75


@lru_cache
def choose_rows(settings: Settings) -> tuple[int, str]:
    """Return the rows of the batch, and a sentence that says why.

    They are the published 16 if the command line gives none, or the largest of 8, 4, 2 and 1 whose step on stock Qwen3
    stays under two minutes in fp32 and fits into memory, both extrapolated from one row by padded tokens.
    """
    if settings.rows is not None:
        return settings.rows, f"Rows: {settings.rows}, as asked for (published: {PUBLISHED_ROWS} per device)."
    if settings.quick:
        return 2, "Rows: 2, a quick run."
    padded = {rows: batches(row_lengths(settings, rows))[1] for rows in (16, 8, 4, 2, 1)}
    tokens = {rows: batch["input_ids"].numel() for rows, batch in padded.items()}
    seconds, kept = _probe(settings, padded[1])
    limit = _MEMORY_SHARE * available_memory()
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
    """Return the seconds of a step of stock Qwen3 on one row, and the bytes that it keeps for the backward pass."""
    model = build_models(configuration(settings, **settings.step_shape))["stock"].train()
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


def embed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the embeddings of a packed batch."""
    return embed_chunk(model, batch["input_ids"], batch["sequence_lengths"])


def embed_padded(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return the embeddings of a padded batch: the last real token of each row."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def stepper(
    model: nn.Module,
    batch: dict[str, Any],
    embedder: Callable[..., Tensor],
    dtype: torch.dtype,
    targets: Callable[[], Tensor | None] = lambda: None,
) -> Callable[[], dict[str, float]]:
    """Return a function that takes one step and returns the terms of its loss; fp32 weights, bf16 by autocast.

    ``targets`` returns a teacher's embeddings, or None without distillation.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    objective = Objective(dims=matryoshka_dims(model.config.hidden_size))

    def step() -> dict[str, float]:
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            terms = objective.terms(embedder(model, batch), batch, targets())
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: term.item() for name, term in terms.items()}

    return step


def run(settings: Settings, suite: Suite) -> None:
    """Time the step of every model in every precision."""
    rows, why = choose_rows(settings)
    suite.notes.append(why)
    lengths = row_lengths(settings, rows)
    packed, padded = batches(lengths)
    facts = {"rows": rows, "real_tokens": packed["input_ids"].numel(), "padded_tokens": padded["input_ids"].numel()}
    suite.notes.append(
        f"The batch has {facts['real_tokens']:,} real tokens, {facts['padded_tokens']:,} when padded: "
        f"{facts['padded_tokens'] / facts['real_tokens']:.2f} times as many."
    )
    for precision in settings.precisions:
        models = build_models(configuration(settings, **settings.step_shape), compile=settings.compile)
        contestants = {}
        for name, model in models.items():
            given = (padded, embed_padded) if name == "stock" else (packed, embed)
            compiled = name == "ours_compiled"
            step = stepper(model, *given, PRECISIONS[precision])
            contestants[name] = Contestant(step, warm_ups=2 if compiled else 1, optional=compiled)
        known = {
            "precision": precision,
            "check": partial(_check, tolerance=1e-3 if precision == "fp32" else 2e-2),
            "facts": facts,
        }
        measurement = measure("training step", contestants, settings.repeats, **known)
        for name in ("ours", "ours_compiled"):
            add_ratio(measurement, "stock", name)
        suite.add(measurement)


def _check(terms: dict[str, dict[str, float]], tolerance: float) -> None:
    losses = {name: sum(each.values()) for name, each in terms.items()}
    worst = max(abs(loss - losses["stock"]) for loss in losses.values())
    assert worst <= tolerance * abs(losses["stock"]), f"the first losses differ: {losses}"
