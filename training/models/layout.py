"""Who encodes which texts of a global batch: shares of processes, and chunks that fit a token budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class BatchLayout(NamedTuple):
    """One process's part of a global batch.

    Attributes:
        chunks: Texts of each forward pass, as positions among the batch's texts. Every process has as many chunks as
            every other (sharded weights are gathered in each forward pass, which all must join); where there is nothing
            left to do, a chunk repeats the shortest text, and the repetition is not used.
        slots: ``(n,)`` where the embedding of each text of the batch lies once the processes' embeddings, ``width``
            from each, are gathered one after the other.
        width: Embeddings that a process hands in at most.
    """

    chunks: list[np.ndarray]
    slots: np.ndarray
    width: int

    def of_batch(self, lengths: np.ndarray) -> dict[str, Any]:
        """``chunk_lengths``, ``slots`` and ``width``, as a batch of the collator holds them.

        Args:
            lengths: ``(n,)`` token counts of the batch's distinct texts, as given to :func:`lay_out`.
        """
        return {
            "chunk_lengths": [lengths[chunk].tolist() for chunk in self.chunks],
            "slots": torch.from_numpy(self.slots),
            "width": self.width,
        }


def lay_out(lengths: np.ndarray, rank: int = 0, world_size: int = 1, max_tokens: int | None = None) -> BatchLayout:
    """Divides the texts of a batch, each once, over the processes and into chunks.

    Args:
        lengths: ``(n,)`` token counts of the batch's distinct texts, in ascending order.
        rank: This process.
        world_size: Number of processes.
        max_tokens: Tokens of a chunk at most (a longer text is a chunk of its own); None for one chunk.

    Returns:
        This process's part. All processes compute the same division without talking.
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
    """Deals texts, ordered by length, to and fro over the processes: sums differ by less than the longest text."""
    dealt = np.arange(texts)[::-1]
    turn = np.arange(texts) % (2 * world_size)
    process = np.minimum(turn, 2 * world_size - 1 - turn)
    return [np.sort(dealt[process == rank]) for rank in range(world_size)]


def balanced_chunks(texts: np.ndarray, lengths: np.ndarray, max_tokens: int | None) -> list[np.ndarray]:
    """Cuts texts, ordered by length, into neighbouring chunks of about equal size that keep to ``max_tokens``.

    Neighbours in length share attention calls, and chunks of equal size leave none nearly empty.
    """
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
