"""A training step: forward, in-batch and hard losses under matryoshka, backward, AdamW.

Each row has a query, a positive and seven hard negatives, as long as those of the published training. Stock Qwen3 gets
them as the released training code gives them: in one batch, padded to one length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.batch_rows import choose_rows
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.settings import PRECISIONS, Settings, device
from tests.benchmarks.suite import Suite
from tests.benchmarks.texts import batches, row_lengths
from tests.benchmarks.timing import Contestant, add_ratio, measure
from training.models.encoding import embed_chunk
from training.trainer.objective import Objective

__all__ = ["embed", "embed_padded", "run", "stepper"]


def embed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Embeddings of a packed batch."""
    return embed_chunk(model, batch["input_ids"], batch["sequence_lengths"])


def embed_padded(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Embeddings of a padded batch: the last real token of each row."""
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def stepper(
    model: nn.Module, batch: dict[str, Any], embedder: Callable[..., Tensor], dtype: torch.dtype
) -> Callable[[], float]:
    """A function that takes one step and returns its loss; fp32 weights, bf16 by autocast."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    objective = Objective(dims=matryoshka_dims(model.config.hidden_size))

    def step() -> float:
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = sum(objective.terms(embedder(model, batch), batch).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def run(settings: Settings, suite: Suite) -> None:
    """Times the step of every model in every precision."""
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
        models, missing = build_models(configuration(settings, **settings.step_shape), compile=settings.compile)
        contestants = {
            name: Contestant(
                stepper(
                    model,
                    padded if name == "stock" else packed,
                    embed_padded if name == "stock" else embed,
                    PRECISIONS[precision],
                ),
                warm_ups=2 if name == "ours_compiled" else 1,
                optional=name == "ours_compiled",
            )
            for name, model in models.items()
        }
        for name, reason in missing.items():
            suite.skip(name, reason)
        measurement = measure(
            "training step", contestants, settings.repeats, precision=precision, check=_check(precision), facts=facts
        )
        for name in ("ours", "ours_compiled"):
            add_ratio(measurement, "stock", name)
        suite.add(measurement)


def _check(precision: str) -> Callable[[dict[str, float]], None]:
    tolerance = 1e-3 if precision == "fp32" else 2e-2

    def check(losses: dict[str, float]) -> None:
        worst = max(abs(loss - losses["stock"]) for loss in losses.values())
        assert worst <= tolerance * abs(losses["stock"]), f"the first losses differ: {losses}"

    return check
