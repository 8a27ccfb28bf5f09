"""A training step: forward, in-batch and hard losses under matryoshka, backward, AdamW.

Each row has a query, a positive and seven hard negatives, as long as those of the published training. Stock Qwen3 gets
them as the released training code gives them: in one batch, padded to one length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.common import (
    Batch,
    Settings,
    autocast,
    available_memory,
    batches,
    build_models,
    configuration,
    row_lengths,
)
from tests.benchmarks.timing import Contestant, Suite, time_call
from training.models.encoding import embed_chunk
from training.trainer.objective import Objective

PUBLISHED_ROWS = 16
_MOST_SECONDS = 120.0
# What is kept for the backward pass is not all that a step needs, and the machine is not ours alone.
_MEMORY_SHARE = 0.75


def training_lengths(settings: Settings, suite: Suite) -> np.ndarray:
    """``(rows, 9)`` tokens of the texts of the training batch; a note says why it has so many rows."""
    rows, why = _choose_rows(settings)
    suite.notes.append(f"Rows: {rows} (published: {PUBLISHED_ROWS} per device)" + why)
    return row_lengths(settings, rows)


@lru_cache
def _choose_rows(settings: Settings) -> tuple[int, str]:
    """Return the rows of the command line, or the published 16 if their step on stock Qwen3 is possible in fp32.

    It must stay under two minutes and fit into memory, both extrapolated from one row by padded tokens; otherwise the
    largest of 8, 4, 2 and 1 rows is taken.
    """
    if settings.rows is not None or settings.quick:
        return settings.rows or 2, ", as asked for."
    padded = {rows: batches(row_lengths(settings, rows))[1] for rows in (16, 8, 4, 2, 1)}
    seconds, kept = _probe(settings, padded[1])
    scales = {rows: batch["input_ids"].numel() / padded[1]["input_ids"].numel() for rows, batch in padded.items()}
    limit = _MEMORY_SHARE * available_memory()
    fitting = (rows for rows, each in scales.items() if seconds * each <= _MOST_SECONDS and kept * each <= limit)
    scale = scales[PUBLISHED_ROWS]
    return next(fitting, 1), (
        f". A stock fp32 step on {PUBLISHED_ROWS} would take about {seconds * scale:.0f} s and keep about "
        f"{kept * scale / 2**30:.1f} GiB for its backward pass; limits: {_MOST_SECONDS:.0f} s and "
        f"{limit / 2**30:.1f} GiB."
    )


def _probe(settings: Settings, batch: Batch) -> tuple[float, int]:
    """Return the seconds of a step of stock Qwen3 on one row, and the bytes that it keeps for the backward pass."""
    model = build_models(configuration(settings, **settings.step_shape))["stock"].train()
    step = forward_backward(model, batch, "fp32", embed_padded)
    # What is kept includes the weights, which are there anyway.
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return time_call(step)[0], sum(size for pointer, size in kept.items() if pointer not in weights)


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """Return the embeddings of a packed batch."""
    return embed_chunk(model, batch["input_ids"], batch["sequence_lengths"])


def embed_padded(model: nn.Module, batch: Batch) -> Tensor:
    """Return the embeddings of a padded batch: the last real token of each row."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def forward_backward(
    model: nn.Module, batch: Batch, precision: str, embedder: Callable[..., Tensor] = embed
) -> Callable[[], None]:
    """Return a function that goes forward and backward; fp32 weights, bf16 by autocast."""

    def run() -> None:
        with autocast(precision):
            embeddings = embedder(model, batch)
        embeddings.square().mean().backward()
        model.zero_grad()

    return run


def stepper(
    model: nn.Module,
    batch: Batch,
    precision: str,
    embedder: Callable[..., Tensor] = embed,
    targets: Callable[[], Tensor | None] = lambda: None,
) -> Callable[[], dict[str, float]]:
    """Return a function that takes one step and returns the terms of its loss; fp32 weights, bf16 by autocast.

    ``targets`` returns a teacher's embeddings, or None without distillation.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    objective = Objective(dims=matryoshka_dims(model.config.hidden_size))

    def step() -> dict[str, float]:
        with autocast(precision):
            terms = objective.terms(embedder(model, batch), batch, targets())
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: term.item() for name, term in terms.items()}

    return step


def run(settings: Settings, suite: Suite) -> None:
    """Time the step of every model in every precision."""
    lengths = training_lengths(settings, suite)
    packed, padded = batches(lengths)
    real, with_padding = packed["input_ids"].numel(), padded["input_ids"].numel()
    facts = {"rows": len(lengths), "real_tokens": real, "padded_tokens": with_padding}
    suite.notes.append(
        f"The batch has {real:,} real tokens, {with_padding:,} when padded: {with_padding / real:.2f} times as many."
    )
    for precision in settings.precisions:
        models = build_models(configuration(settings, **settings.step_shape), compile=settings.compile)
        batch_of = {"stock": (padded, precision, embed_padded)}
        steps = {name: stepper(model, *batch_of.get(name, (packed, precision))) for name, model in models.items()}
        contestants = {name: Contestant.compiled(step, name == "ours_compiled") for name, step in steps.items()}
        pairs = [("stock", name) for name in ("ours", "ours_compiled")]
        known = {"precision": precision, "facts": facts}
        known["check"] = partial(_check, tolerance=1e-3 if precision == "fp32" else 2e-2)
        suite.compare("training step", contestants, settings.repeats, pairs, **known)


def _check(terms: dict[str, dict[str, float]], tolerance: float) -> None:
    losses = {name: sum(each.values()) for name, each in terms.items()}
    worst = max(abs(loss - losses["stock"]) for loss in losses.values())
    assert worst <= tolerance * abs(losses["stock"]), f"the first losses differ: {losses}"
