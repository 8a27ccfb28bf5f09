"""What the parts of ``gpu.py`` share: how they run, models of the same weights, and speeds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from transformers import Qwen3Model, Trainer  # noqa: F401 - looks for optional packages before any has a stand-in

from modeling_f2llm import F2LLMConfig, F2LLMModel, build_sentence_transformer
from tests.benchmarks.common import Settings, configuration, device, row_lengths, word_tokenizer, write_texts
from tests.benchmarks.lean_imports import stand_ins
from tests.benchmarks.timing import spread, time_call

with stand_ins():
    from training.planning.batches import Batches
    from training.planning.costs import step_flops


@dataclass
class Bench:
    """How a part runs, and where its records go."""

    emit: Callable[[dict[str, Any]], None]
    tiny: bool = False
    rate: float | None = None  # bf16 operations per second of large matrix products
    ends: float = float("inf")  # by time.monotonic()

    def attempt(self, key, measure):
        """Record a measurement, or why there is none; whatever fails stops nothing else."""
        if time.monotonic() > self.ends:
            found = {"left_out": "the time of this part was over"}
        else:
            try:
                found = measure()
            except Exception as error:
                found = {"left_out": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        self.emit({**key, **found})
        free()

    def shape(self, name):
        """Return a published shape with its vocabulary, or a tiny one."""
        vocabulary = {} if self.tiny else {"vocab_size": F2LLMConfig.from_family(name).vocab_size}
        return configuration(Settings(quick=self.tiny), name, **vocabulary)

    def lengths(self, rows):
        """``(rows, 9)`` log-normal tokens of queries, positives and hard negatives."""
        return row_lengths(Settings(quick=self.tiny), rows)


def free():
    """Give memory of the GPU back that nothing refers to."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def seeded_model(config):
    """F2LLMModel with random weights, drawn on its device."""
    torch.manual_seed(0)
    with torch.device(device()):
        return F2LLMModel(deepcopy(config))


def stock_twin(model, attention="sdpa"):
    """Stock Qwen3 with the very parameters of a model."""
    with init_empty_weights(include_buffers=False):
        stock = Qwen3Model._from_config(deepcopy(model.config), attn_implementation=attention)
    stock.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return stock.to(device())


def padded_encoder(model):
    """SentenceTransformer around a model, which gets padded batches."""
    return build_sentence_transformer(model, word_tokenizer(), prompts={})


def use_compiled(model, on):
    """Switch compilation on or off, and return the model."""
    for layer in model.layers:
        layer.compiled = on
    return model


def timed(run, seconds):
    """Median, smallest and largest seconds of up to three calls, none begun after so many seconds."""
    samples = []
    while not samples or (len(samples) < 3 and sum(samples) < seconds):
        samples.append(time_call(run)[0])
    return {**spread(samples), "calls": len(samples)}


def largest_that_fits(size, measure):
    """Return ``measure(size)``, with half the size as long as memory does not suffice."""
    while True:
        try:
            return measure(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Only now: the frames of the exception held tensors.
        size //= 2
        free()


def columns_of(lengths):
    """The texts of each role, as sentence-transformers takes them."""
    texts = np.array(write_texts(lengths.T.reshape(-1)))
    return [column.tolist() for column in np.split(texts, lengths.shape[1])]


def operations(config, lengths, repeated=0, checkpointing=False, adapter=False):
    """Operations of a step on texts of these lengths, of which so many tokens are encoded twice."""
    tokens, squared = float(lengths.sum()), float((lengths.astype(float) ** 2).sum())
    batch = Batches(1, tokens, lengths.size, squared_tokens=squared, repeated_tokens=float(repeated))
    return step_flops(config, batch, checkpointing, adapter)


def speed(lengths, seconds):
    """Real tokens, and rows, per second."""
    tokens = int(lengths.sum())
    per_second = {"tokens_per_second": tokens / seconds["median"], "rows_per_second": len(lengths) / seconds["median"]}
    return {"rows": len(lengths), "tokens": tokens, "seconds": seconds, **per_second}


def fraction(bench, count, seconds, what):
    """Operations per second, and what part of the matrix rate they are."""
    per_second = count / seconds["median"]
    return {f"{what}_operations_per_second": per_second, f"{what}_fraction": bench.rate and per_second / bench.rate}
