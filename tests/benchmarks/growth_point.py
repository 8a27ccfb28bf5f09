"""One point of ``growth.py``: reads what to measure from standard input, writes the results to standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.memory import process_memory
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.settings import Settings, device
from tests.benchmarks.step import embed
from tests.benchmarks.texts import batches, row_lengths
from tests.benchmarks.timing import spread, time_call
from training.models.layout import lay_out
from training.trainer.gradient_cache import CachedStep
from training.trainer.objective import Objective

__all__ = ["growth_batch", "growth_length", "time_and_memory"]


def _training_step(model: nn.Module, batch: dict[str, Any], precision: str, max_tokens: int) -> Callable[[], Any]:
    """A step as the trainer takes it: in chunks of at most ``max_tokens``, with a gradient cache."""
    lengths = np.array(batch["sequence_lengths"])
    batch = {**batch, **lay_out(lengths, max_tokens=max_tokens).of_batch(lengths)}
    accelerator = Accelerator(cpu=device().type == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    objective = Objective(dims=matryoshka_dims(model.config.hidden_size))

    def autocast() -> AbstractContextManager:
        return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        CachedStep(accelerator, model, autocast).run(
            batch, lambda embeddings: torch.stack(list(objective.terms(embeddings, batch).values())).sum()
        )
        optimizer.step()
        optimizer.zero_grad()

    return step


def growth_batch(settings: Settings, task: dict[str, Any]) -> dict[str, Any]:
    """A step on ``value`` rows."""
    packed, _ = batches(row_lengths(settings, task["value"]))
    step = _training_step(_model(settings), packed, task["precision"], task["max_tokens"])
    return {**time_and_memory(step, settings.repeats, device()), "tokens": packed["input_ids"].numel()}


def growth_length(settings: Settings, task: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward over texts of ``value`` tokens each, as many as make up ``tokens``."""
    count = max(2, task["tokens"] // task["value"])
    packed, _ = batches(np.full((1, count), task["value"]))
    model = _model(settings)

    def forward_backward() -> None:
        with torch.autocast(device().type, torch.bfloat16, enabled=task["precision"] == "bf16"):
            embeddings = embed(model, packed)
        embeddings.square().mean().backward()
        model.zero_grad()

    return {**time_and_memory(forward_backward, settings.repeats, device()), "tokens": packed["input_ids"].numel()}


def _model(settings: Settings) -> nn.Module:
    return build_models(configuration(settings))[0]["ours"].train()


def time_and_memory(work: Callable[[], Any], repeats: int, where: torch.device) -> dict[str, Any]:
    """Spread of the seconds after one warm-up call, and the memory there before and at the peak."""
    cuda = where.type == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else process_memory("VmRSS")
    work()
    seconds = [time_call(work)[0] for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else process_memory("VmHWM")
    return {"seconds": spread(seconds), "before_mib": before, "peak_mib": peak}


_AXES = {"batch": growth_batch, "length": growth_length}


def main() -> None:
    request = json.load(sys.stdin)
    settings = Settings(**request["settings"])
    if settings.quick:
        torch.set_num_threads(1)
    points = []
    for task in request["tasks"]:
        point = _AXES[task["axis"]](settings, task)
        points.append({"axis": task["axis"], "value": task["value"], "precision": task["precision"], **point})
    sys.stdout.write(json.dumps(points) + "\n")


if __name__ == "__main__":
    main()
