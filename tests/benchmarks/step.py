"""A training step: forward, in-batch and hard losses under matryoshka, backward, AdamW.

Each row has a query, a positive and seven hard negatives, as long as those of the published training. Stock Qwen3 gets
them as the released training code gives them: in one batch, padded to one length.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from accelerate import Accelerator

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.common import autocast, batches, build_models, device, row_lengths
from tests.benchmarks.timing import Contestant
from training.models.encoding import embed_chunk, lay_out
from training.trainer.step import CachedStep, Objective


def training_lengths(settings, suite):
    """``(rows, 9)`` tokens of the texts of the training batch."""
    # A stock step of all layers in fp32 keeps about 4 GiB a row for its backward pass.
    rows = settings.rows or settings.pick(quick=2, cpu=4, cuda=16)
    suite.notes.append(f"Rows: {rows} (published: 16 per device).")
    return row_lengths(settings, rows)


def embed(model, batch):
    """Return the embeddings of a packed batch."""
    return embed_chunk(model, batch["input_ids"], batch["sequence_lengths"])


def embed_padded(model, batch):
    """Return the embeddings of a padded batch: the last real token of each row."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def forward_backward(model, batch, precision):
    """Return a function that goes forward and backward over a packed batch; fp32 weights, bf16 by autocast."""

    def run():
        with autocast(precision):
            embeddings = embed(model, batch)
        embeddings.square().mean().backward()
        model.zero_grad()

    return run


def whole_gradient(model, batch, precision, embedder=embed, targets=lambda: None):
    """Return a function that accumulates the gradient of a batch and returns the terms of its loss.

    ``targets`` returns a teacher's embeddings, or None without distillation.
    """
    model.train()
    objective = Objective(dims=matryoshka_dims(model.config.hidden_size))

    def accumulate():
        with autocast(precision):
            terms = objective.terms(embedder(model, batch), batch, targets())
        sum(terms.values()).backward()
        return {name: term.item() for name, term in terms.items()}

    return accumulate


def optimized(model, accumulate):
    """Return a function that accumulates gradients, lets AdamW apply them, and returns what accumulating returned."""
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-5, fused=True)

    def step():
        returned = accumulate()
        optimizer.step()
        optimizer.zero_grad()
        return returned

    return step


def stepper(model, batch, *how, **targets):
    """Return a function that takes one step and returns the terms of its loss; fp32 weights, bf16 by autocast."""
    return optimized(model, whole_gradient(model, batch, *how, **targets))


def laid_out(packed, budget):
    """Return a packed batch in chunks of ``budget`` tokens, as a trainer gets it."""
    lengths = np.array(packed["sequence_lengths"])
    return {**packed, **lay_out(lengths, max_tokens=budget).of_batch(lengths)}


def cached_gradient(model, packed, budget, precision, dims):
    """Return a function that accumulates the gradient as the trainer does, in chunks of ``budget`` tokens.

    It returns the loss.
    """
    batch, objective = laid_out(packed, budget), Objective(dims=dims)
    step = CachedStep(Accelerator(cpu=device().type == "cpu"), model.train(), partial(autocast, precision))

    def accumulate():
        loss, _ = step.run(batch, lambda states: torch.stack(list(objective.terms(states, batch).values())).sum())
        return loss.item()

    return accumulate


def run(settings, suite):
    """Time the step of every model in every precision."""
    lengths = training_lengths(settings, suite)
    packed, padded = batches(lengths)
    real, with_padding = packed["input_ids"].numel(), padded["input_ids"].numel()
    facts = {"rows": len(lengths), "real_tokens": real, "padded_tokens": with_padding}
    suite.notes.append(
        f"The batch has {real:,} real tokens, {with_padding:,} when padded: {with_padding / real:.2f} times as many."
    )
    for precision in settings.precisions:
        models = build_models(settings, compile=settings.compile, **settings.step_shape)
        batch_of = {"stock": (padded, precision, embed_padded)}
        steps = {name: stepper(model, *batch_of.get(name, (packed, precision))) for name, model in models.items()}
        contestants = {name: Contestant.compiled(step, name == "ours_compiled") for name, step in steps.items()}
        pairs = [("stock", name) for name in ("ours", "ours_compiled")]
        known = {"precision": precision, "facts": facts}
        known["check"] = partial(_check, tolerance=1e-3 if precision == "fp32" else 2e-2)
        suite.compare("training step", contestants, settings.repeats, pairs, **known)


def _check(terms, tolerance):
    losses = {name: sum(each.values()) for name, each in terms.items()}
    worst = max(abs(loss - losses["stock"]) for loss in losses.values())
    assert worst <= tolerance * abs(losses["stock"]), f"the first losses differ: {losses}"
