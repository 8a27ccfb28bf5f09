"""Embeddings of packed texts, on one process or gathered from several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def embed_chunk(model: nn.Module, input_ids: Tensor, lengths: list[int]) -> Tensor:
    """``(n, d)`` unnormalised embeddings of the ``n`` texts packed in ``(1, T)`` ids: the last token of each."""
    hidden = model(input_ids=input_ids, sequence_lengths=lengths).last_hidden_state[0]
    return hidden[torch.tensor(lengths, device=hidden.device).cumsum(0) - 1]


def embed_batch(model: nn.Module, batch: dict[str, Any], width: int | None = None) -> Tensor:
    """``(n, d)`` embeddings of all distinct texts of a global batch, on every process; without gradient.

    Args:
        model: The model, wrapped or not.
        batch: This process's part of the batch.
        width: Leading dimensions to keep; None keeps all.
    """
    with torch.no_grad():
        own = torch.cat([embed_chunk(model, *chunk)[:, :width] for chunk in _chunks(batch)])
    return gather_texts(own, batch)


def gather_texts(own: Tensor, batch: dict[str, Any]) -> Tensor:
    """``(n, d)`` embeddings of a global batch's distinct texts, from those of each process's own; without gradient.

    Args:
        own: ``(m, d)`` embeddings of this process's texts, in the order of its chunks.
        batch: This process's part of the batch.
    """
    return _gather(own.float(), batch["width"])[batch["slots"]]


def _chunks(batch: dict[str, Any]) -> Iterator[tuple[Tensor, list[int]]]:
    """This process's chunks: ``(1, t)`` ids and the lengths of the texts in them."""
    lengths = batch["chunk_lengths"]
    return zip(batch["input_ids"].split([sum(chunk) for chunk in lengths], dim=1), lengths, strict=True)


def _gather(own: Tensor, width: int) -> Tensor:
    """``(m, d)`` of each process, ``m <= width`` → ``(processes * width, d)``, the same on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    padded = own.new_zeros(width, own.shape[1])
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat(gathered)
