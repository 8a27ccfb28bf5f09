"""How time and memory grow with the batch and the length of the texts (``preparation.py``: and with the corpus)."""

from __future__ import annotations

import numpy as np

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.apart import measure_apart, time_and_memory
from tests.benchmarks.common import available_memory, build_models, device, packed_batch, row_lengths
from tests.benchmarks.step import cached_gradient, forward_backward, optimized

# A point that would need more than this share of the free memory is not tried.
_MEMORY_SHARE = 0.6


def run(settings, suite):
    """Measure each axis upwards, until a point fails or would not fit into memory."""
    budget = settings.pick(quick=1024, cpu=4096, cuda=65536)
    tokens = settings.pick(quick=256, cpu=8192, cuda=131072)
    rows = settings.pick(quick=[2], cpu=[1, 2, 4, 8, 16, 32], cuda=[8, 16, 32, 64, 128])
    lengths = settings.pick(quick=[64], cpu=[64, 128, 256, 512, 1024, 2048], cuda=[128, 512, 2048, 8192])
    # The next point has twice the rows. Along the length, the number of tokens stays.
    for axis, values, growth in (("batch", rows, 2), ("length", lengths, 1)):
        expected = 0.0
        for value in values:
            limit = _MEMORY_SHARE * available_memory()
            task = {"axis": axis, "value": value, "precision": settings.precisions[0]}
            try:
                if expected > limit:
                    raise RuntimeError(f"expected to need {expected / 2**30:.1f} GiB, more than {limit / 2**30:.1f}")
                point = measure_apart(f"growth.{axis}", settings, {**task, "budget": budget, "total": tokens})
            except RuntimeError as error:
                suite.skip(f"growth with {axis}, {value:,} and beyond", str(error))
                break
            suite.add_point(point)
            expected = (point["peak_mib"] - point["before_mib"]) * growth * 2**20


def batch(settings, task):
    """Take a step on ``value`` rows as the trainer does: in chunks of ``budget`` tokens, with a gradient cache."""
    packed, model = packed_batch(row_lengths(settings, task["value"])), build_models(settings)["ours"]
    dims = matryoshka_dims(model.config.hidden_size)
    step = optimized(model, cached_gradient(model, packed, task["budget"], task["precision"], dims))
    return {**time_and_memory(step, settings.repeats, device()), "tokens": packed["input_ids"].numel()}


def length(settings, task):
    """Go forward and backward over texts of ``value`` tokens each, as many as make up ``total``."""
    packed = packed_batch(np.full((1, max(2, task["total"] // task["value"])), task["value"]))
    model = build_models(settings)["ours"].train()
    work = forward_backward(model, packed, task["precision"])
    return {**time_and_memory(work, settings.repeats, device()), "tokens": packed["input_ids"].numel()}
