"""Packed texts: chunks within a token budget, divided over processes, embedded and gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.data.prepared import PreparedSource


class BatchLayout(NamedTuple):
    """One process's part of a global batch: the texts of each forward pass, as positions among the batch's texts."""

    # Equally many on all processes, for all gather sharded weights; missing ones repeat the shortest text, unused.
    chunks: list[np.ndarray]
    slots: np.ndarray  # (n,) index of each text's embedding in the gathered ones
    max_rows_per_rank: int  # of each process in the gathered ones

    def of_batch(self, lengths: np.ndarray) -> dict[str, Any]:
        """Return the three as the collator names them, for the token counts given to `lay_out`."""
        return {
            "chunk_lengths": [lengths[chunk].tolist() for chunk in self.chunks],
            "slots": torch.from_numpy(self.slots),
            "max_rows_per_rank": self.max_rows_per_rank,
        }


def lay_out(lengths: np.ndarray, rank: int = 0, world_size: int = 1, max_tokens: int | None = None) -> BatchLayout:
    """Divide the texts of a batch, each once, over the processes and into chunks, without communication.

    ``lengths`` are the ``(n,)`` token counts of the distinct texts, in ascending order. A chunk has ``max_tokens`` at
    most, unless one text is longer; None for one chunk.
    """
    of_rank = [balanced_chunks(share, lengths[share], max_tokens) for share in shares(len(lengths), world_size)]
    slots = np.empty(len(lengths), dtype=np.int64)
    most = max(len(chunks) for chunks in of_rank)
    padded = [[*chunks, *[np.zeros(1, dtype=np.int64)] * (most - len(chunks))] for chunks in of_rank]
    width = max(sum(map(len, chunks)) for chunks in padded)
    for process, chunks in enumerate(of_rank):
        if chunks:
            texts = np.concatenate(chunks)
            slots[texts] = process * width + np.arange(len(texts))
    return BatchLayout(padded[rank], slots, width)


def shares(texts: int, world_size: int) -> list[np.ndarray]:
    """Assign texts, ordered by length, to ranks in serpentine order: sums differ by less than the longest text."""
    descending = np.arange(texts)[::-1]
    turn = np.arange(texts) % (2 * world_size)
    process = np.minimum(turn, 2 * world_size - 1 - turn)
    return [np.sort(descending[process == rank]) for rank in range(world_size)]


def balanced_chunks(texts: np.ndarray, lengths: np.ndarray, max_tokens: int | None) -> list[np.ndarray]:
    """Cut texts, ordered by length, into neighbouring chunks of about equal size within ``max_tokens``."""
    if not len(texts):
        return []
    if max_tokens is None:
        return [texts]
    total = int(lengths.sum())
    middles = np.cumsum(lengths) - lengths / 2
    # Ends at the latest when a share of the tokens is smaller than every text.
    parts = -(-total // max_tokens)
    while True:
        part = np.minimum((middles * parts / total).astype(np.int64), parts - 1)
        tokens, count = np.bincount(part, weights=lengths), np.bincount(part)
        if ((tokens <= max_tokens) | (count == 1)).all():
            return np.split(texts, np.flatnonzero(np.diff(part)) + 1)
        parts += 1


class PackedTexts(NamedTuple):
    """``(1, T)`` token ids of texts at ``(n,)`` positions of a source, end to end, and the ``n`` token counts."""

    positions: np.ndarray
    input_ids: Tensor
    lengths: list[int]


def packed_texts(source: PreparedSource, positions: np.ndarray, max_tokens: int) -> Iterator[PackedTexts]:
    """Pack the texts at ``(n,)`` positions, shortest first, ``max_tokens`` at once; a longer text comes alone."""
    positions = positions[np.argsort(source.lengths(positions), kind="stable")]
    for chunk in balanced_chunks(positions, source.lengths(positions), max_tokens):
        tokens = np.concatenate([source.tokens(text) for text in chunk])
        yield PackedTexts(chunk, torch.from_numpy(tokens.astype(np.int64))[None], source.lengths(chunk).tolist())


def embed_chunk(
    model: nn.Module, input_ids: Tensor, lengths: list[int], exit_layers: Sequence[int] | None = None
) -> Tensor:
    """``(n, d)`` unnormalised embeddings of the ``n`` texts packed in ``(1, T)`` ids: the last token of each.

    With exit layers, ``(n, exits * d)``: those of models of so many layers side by side, by one forward pass. A static
    model, of which a text has no hidden states, returns the embeddings itself.
    """
    options = {} if exit_layers is None else {"exit_layers": exit_layers}
    output = model(input_ids=input_ids, sequence_lengths=lengths, last_token_only=True, **options)
    if exit_layers is not None:
        return torch.cat([each[0] for each in output.hidden_states], dim=1)
    return output if isinstance(output, Tensor) else output.last_hidden_state[0]


def embed_batch(model: nn.Module, batch: dict[str, Any], width: int | None = None) -> Tensor:
    """``(n, width)`` embeddings of all distinct texts of a global batch, on every process; without gradient."""
    with torch.no_grad():
        own = torch.cat([embed_chunk(model, *chunk)[:, :width] for chunk in batch_chunks(batch)])
    return gather_texts(own, batch)


def gather_texts(own: Tensor, batch: dict[str, Any]) -> Tensor:
    """``(n, d)`` embeddings of a global batch's texts from each process's ``(m, d)`` own ones; without gradient."""
    return gather_rows(own.float(), batch["max_rows_per_rank"])[batch["slots"]]


def batch_chunks(batch: dict[str, Any]) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield ``(1, t)`` ids of each of this process's chunks, and the lengths of the texts in it."""
    lengths = batch["chunk_lengths"]
    return zip(batch["input_ids"].split([sum(chunk) for chunk in lengths], dim=1), lengths, strict=True)


def gather_rows(own: Tensor, max_rows: int) -> Tensor:
    """``(m, d)`` of each process, ``m <= max_rows`` → ``(processes * max_rows, d)``, the same on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    padded = own.new_zeros(max_rows, own.shape[1])
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat(gathered)
