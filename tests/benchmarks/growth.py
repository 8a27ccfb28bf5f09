"""How time and memory grow with the batch and the length of the texts (``preparation.py``: and with the corpus).

Each point runs in its own process, which this module starts: the peak memory of a process never falls again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.machine import Settings, available_memory, device, process_memory
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.step import embed
from tests.benchmarks.texts import batches, row_lengths
from tests.benchmarks.timing import Suite, spread, time_call
from training.models.encoding import lay_out
from training.trainer.step import CachedStep, Objective

_ROOT = Path(__file__).resolve().parents[2]
# A point that would need more than this share of the free memory is not tried.
_MEMORY_SHARE = 0.6

Point = Callable[[Settings, dict[str, Any]], dict[str, Any]]


def run(settings: Settings, suite: Suite) -> None:
    """Measure all points of all axes."""
    budget = settings.pick(quick=1024, cpu=4096, cuda=65536)
    tokens = settings.pick(quick=256, cpu=8192, cuda=131072)
    suite.notes += [
        f"Batch: one training step (losses and AdamW included) on rows of the published shape; at most {budget:,} "
        "tokens in one forward pass where the trainer can split it.",
        f"Length: one forward and backward pass over texts of one length, {tokens:,} tokens in all.",
        "Memory is the peak above that of the process with its libraries and the model loaded.",
    ]
    rows = settings.pick(quick=[2], cpu=[1, 2, 4, 8, 16, 32], cuda=[8, 16, 32, 64, 128])
    lengths = settings.pick(quick=[64], cpu=[64, 128, 256, 512, 1024, 2048], cuda=[128, 512, 2048, 8192])
    shared = {"precision": settings.precisions[0], "max_tokens": budget, "tokens": tokens}
    for axis, values in (("batch", rows), ("length", lengths)):
        _measure_axis(settings, suite, [{"axis": axis, "value": value, **shared} for value in values])


def _measure_axis(settings: Settings, suite: Suite, tasks: list[dict[str, Any]]) -> None:
    """Measure one axis upwards, until a point fails or would not fit into memory."""
    expected = 0.0
    for task in tasks:
        what = f"growth with {task['axis']}, {task['value']:,} and beyond"
        limit = _MEMORY_SHARE * available_memory()
        if expected > limit:
            suite.skip(what, f"expected to need {expected / 2**30:.1f} GiB, more than {limit / 2**30:.1f}")
            return
        try:
            point = measure_apart("growth", settings, task)
        except RuntimeError as error:
            suite.skip(what, str(error))
            return
        suite.add_point(point)
        # The next point has twice the rows. Along the length, the number of tokens stays.
        growth = 1 if task["axis"] == "length" else 2
        expected = (point["peak_mib"] - point["before_mib"]) * growth * 2**20


def measure_apart(module: str, settings: Settings, task: dict[str, Any]) -> dict[str, Any]:
    """Measure a point in a new process, by a module of this folder that calls :func:`answer`.

    Raises:
        RuntimeError: If the process fails.
    """
    request = json.dumps({"settings": asdict(settings), "task": task})
    command = [sys.executable, "-m", f"tests.benchmarks.{module}"]
    finished = subprocess.run(command, input=request, cwd=_ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        last_line = (finished.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise RuntimeError(f"the process ended with status {finished.returncode}: {last_line}")
    return json.loads(finished.stdout.splitlines()[-1])


def answer(axes: Mapping[str, Point]) -> None:
    """Read the task of :func:`measure_apart` from standard input, and write its point to standard output."""
    request = json.load(sys.stdin)
    # JSON has lists for tuples.
    known = {key: tuple(value) if isinstance(value, list) else value for key, value in request["settings"].items()}
    settings = Settings(**known)
    if settings.quick:
        torch.set_num_threads(1)
    task = request["task"]
    known = {key: task[key] for key in ("axis", "value", "precision")}
    sys.stdout.write(json.dumps({**known, **axes[task["axis"]](settings, task)}) + "\n")


def time_and_memory(work: Callable[[], Any], repeats: int, where: torch.device) -> dict[str, Any]:
    """Return the seconds after one warm-up call, and the memory before and at the peak."""
    cuda = where.type == "cuda"
    before = torch.cuda.memory_allocated() / 2**20 if cuda else process_memory("VmRSS")
    work()
    seconds = [time_call(work)[0] for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else process_memory("VmHWM")
    return {"seconds": spread(seconds), "before_mib": before, "peak_mib": peak}


def _autocast(precision: str) -> AbstractContextManager:
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")


def _model(settings: Settings) -> nn.Module:
    return build_models(configuration(settings))["ours"].train()


def _batch(settings: Settings, task: dict[str, Any]) -> dict[str, Any]:
    """Take a step on ``value`` rows as the trainer does: in chunks of ``max_tokens``, with a gradient cache."""
    packed, _ = batches(row_lengths(settings, task["value"]))
    lengths, model = np.array(packed["sequence_lengths"]), _model(settings)
    batch = {**packed, **lay_out(lengths, max_tokens=task["max_tokens"]).of_batch(lengths)}
    accelerator = Accelerator(cpu=device().type == "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    objective = Objective(dims=matryoshka_dims(model.config.hidden_size))

    def step() -> None:
        CachedStep(accelerator, model, lambda: _autocast(task["precision"])).run(
            batch, lambda embeddings: torch.stack(list(objective.terms(embeddings, batch).values())).sum()
        )
        optimizer.step()
        optimizer.zero_grad()

    return {**time_and_memory(step, settings.repeats, device()), "tokens": packed["input_ids"].numel()}


def _length(settings: Settings, task: dict[str, Any]) -> dict[str, Any]:
    """Go forward and backward over texts of ``value`` tokens each, as many as make up ``tokens``."""
    count = max(2, task["tokens"] // task["value"])
    packed, _ = batches(np.full((1, count), task["value"]))
    model = _model(settings)

    def forward_backward() -> None:
        with _autocast(task["precision"]):
            embeddings = embed(model, packed)
        embeddings.square().mean().backward()
        model.zero_grad()

    return {**time_and_memory(forward_backward, settings.repeats, device()), "tokens": packed["input_ids"].numel()}


if __name__ == "__main__":
    answer({"batch": _batch, "length": _length})
