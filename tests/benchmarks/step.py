"""A training step: forward, in-batch and hard losses under matryoshka, backward, AdamW.

Each row has a query, a positive and seven hard negatives; documents have log-normal lengths around 120 tokens. Stock
Qwen3 gets them as the released training code gives them: in one batch, padded to one length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeling_f2llm import matryoshka_dims
from tests.benchmarks.models import VOCAB_SIZE, build_models, device
from training.objective import Objective
from training.trainer import embed

__all__ = ["cases"]

ROWS, NEGATIVES = 4, 7


def _lengths(generator: np.random.Generator) -> list[int]:
    """Lengths of all queries, then of all positives, then of all negatives."""
    queries = generator.lognormal(np.log(16), 0.4, ROWS)
    documents = generator.lognormal(np.log(120), 0.6, ROWS * (1 + NEGATIVES))
    return np.concatenate([queries, documents]).clip(4, 1024).astype(int).tolist()


def _batches() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same texts packed, shortest first, and padded."""
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    lengths = _lengths(generator)
    texts = [torch.randint(2, VOCAB_SIZE, (length,)) for length in lengths]
    order = np.argsort(lengths, kind="stable")
    rank = torch.empty(len(texts), dtype=torch.long)
    rank[torch.from_numpy(order)] = torch.arange(len(texts))
    index = torch.arange(len(texts))
    roles = {
        "query": index[:ROWS],
        "positive": index[ROWS : 2 * ROWS],
        "negatives": index[2 * ROWS :].view(ROWS, NEGATIVES),
        "task_type": "retrieval",
    }
    packed = {
        "input_ids": torch.cat([texts[i] for i in order])[None].to(device()),
        "sequence_lengths": [lengths[i] for i in order],
        **{name: rank[value].to(device()) if isinstance(value, Tensor) else value for name, value in roles.items()},
    }
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    padded = {"input_ids": ids.to(device()), "attention_mask": mask.to(device()), **roles}
    return packed, padded


def _embed_padded(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _stepper(model: nn.Module, batch: dict[str, Any], embedder: Callable[..., Tensor], dtype: torch.dtype):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    objective = Objective(dims=matryoshka_dims(model.config.hidden_size))

    def step() -> float:
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = sum(objective.terms(embedder(model, batch), batch).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def cases(dtype: torch.dtype, compile: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """The step on either model; fp32 weights, bf16 by autocast."""
    ours, stock = build_models(compile=compile)
    packed, padded = _batches()
    case = {"ours": _stepper(ours, packed, embed, dtype), "stock": _stepper(stock, padded, _embed_padded, dtype)}
    losses = [function() for function in case.values()]
    assert abs(losses[0] - losses[1]) < 0.02 * abs(losses[1]), f"the models disagree: {losses}"
    return {"log_normal": case}
