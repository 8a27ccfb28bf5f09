"""What a batch is trained on: embeddings of its texts → the terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_f2llm.losses import TEMPERATURE, hard_negative_loss, in_batch_loss

__all__ = ["Objective"]


@dataclass(frozen=True)
class Objective:
    """F2LLM's contrastive objective.

    Hard negatives train every task type, in-batch negatives retrieval only: in clustering and classification the
    positives of other rows may be of the same class.

    Attributes:
        temperature: Divisor of the cosines.
        dims: Widths of matryoshka learning, widest first; None trains the full width only.
        mask_duplicates: Whether another row's positive is left out of a row's in-batch negatives if it is the very text
            of this row's positive or query, or the rows share their query; texts count as the model reads them,
            instruction included. The published training keeps it in.
    """

    temperature: float = TEMPERATURE
    dims: Sequence[int] | None = None
    mask_duplicates: bool = False

    def terms(self, embeddings: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the terms of the loss by name; the loss is their sum.

        Args:
            embeddings: ``(n, d)`` unnormalised embeddings of the batch's distinct texts.
            batch: What :class:`~training.collator.PackedCollator` built.
        """
        query, positive = embeddings[batch["query"]], embeddings[batch["positive"]]
        negatives = embeddings[batch["negatives"]]
        terms = {}
        if batch["task_type"] == "retrieval":
            terms["in_batch"] = in_batch_loss(
                query,
                positive,
                temperature=self.temperature,
                dims=self.dims,
                exclude=_duplicates(batch["query"], batch["positive"]) if self.mask_duplicates else None,
            )
        terms["hard"] = hard_negative_loss(query, positive, negatives, temperature=self.temperature, dims=self.dims)
        return terms


def _duplicates(query: Tensor, positive: Tensor) -> Tensor:
    """``(b, b)`` booleans: other rows whose positive is no negative for this row's query."""
    same = (query[:, None] == query) | (positive[:, None] == positive) | (query[:, None] == positive)
    return same & ~torch.eye(len(query), dtype=torch.bool, device=query.device)
