"""Prints the chunks of a step and its peak memory in MiB: ``peak_memory_worker.py ROWS MAX_TOKENS``.

The model is the 80M model with a small vocabulary. The figure is the growth of the process's peak resident memory from
before the model is made until a step is done: not that of getrusage, which counts the process that started this one.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator

from modeling_f2llm import F2LLMConfig, F2LLMModel
from modeling_f2llm.losses import matryoshka_dims
from tests.benchmarks.common import process_memory
from training.models.encoding import lay_out
from training.trainer.step import CachedStep, Objective

NEGATIVES = 7
# Tokens of a text, short enough for a test on the CPU.
SHORTEST, MEDIAN, LONGEST = 2, 12, 48


def main(rows, max_tokens):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = process_memory("VmHWM")
    tokens = {"vocab_size": 2000, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    config = F2LLMConfig.from_family("f2llm-v2-80m", num_hidden_layers=3, **tokens)
    model = F2LLMModel(config).train()
    rng = np.random.default_rng(0)
    texts = rows * (2 + NEGATIVES)
    lengths = np.sort(rng.lognormal(np.log(MEDIAN), 0.5, texts).clip(SHORTEST, LONGEST).astype(np.int64))
    layout = lay_out(lengths, max_tokens=max_tokens)
    index = torch.from_numpy(rng.permutation(texts).reshape(rows, 2 + NEGATIVES))
    batch = {
        "input_ids": torch.from_numpy(rng.integers(2, config.vocab_size, int(lengths.sum())))[None],
        **layout.of_batch(lengths),
        "query": index[:, 0],
        "positive": index[:, 1],
        "negatives": index[:, 2:],
        "task_type": "retrieval",
    }
    objective = Objective(dims=matryoshka_dims(config.hidden_size))
    step = CachedStep(Accelerator(cpu=True), model, nullcontext)
    step.run(batch, lambda embeddings: torch.stack(list(objective.terms(embeddings, batch).values())).sum())
    sys.stdout.write(f"{len(layout.chunks)} {process_memory('VmHWM') - before:.1f}\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
