"""F2LLM's objective: embeddings of a batch's texts → the terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_f2llm.losses import TEMPERATURE, distillation_loss, hard_negative_loss, in_batch_loss


@dataclass(frozen=True)
class Objective:
    """F2LLM's objective: contrastive terms, and distillation where there is a teacher.

    Hard negatives train every task type, in-batch negatives retrieval only: in clustering and classification the
    positives of other rows may be of the same class.

    ``dims`` are the widths of matryoshka learning, widest first; None trains the full width only. ``mask_duplicates``
    leaves another row's positive out of a row's in-batch negatives if it is the text of this row's positive or query,
    or the rows share their query, in any spelling and with or without instruction; the published training keeps it in.
    Without ``gather_gradients`` positives do not learn from the in-batch term: the published training on several GPUs
    gathers them without gradient.
    """

    temperature: float = TEMPERATURE
    dims: Sequence[int] | None = None
    mask_duplicates: bool = False
    gather_gradients: bool = True
    distillation_weight: float = 1.0

    def terms(
        self,
        embeddings: Tensor,
        batch: Mapping[str, Any],
        teacher: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the terms of the loss by name; the loss is their sum.

        Args:
            embeddings: ``(n, d)`` unnormalised embeddings of the batch's distinct texts.
            batch: What :class:`~training.trainer.batches.PackedCollator` built.
            teacher: ``(n, D)`` unnormalised embeddings of the same texts by a teacher.
            projected: ``(n, d')``, ``d' <= D``: what is compared with the teacher's leading dimensions; the embeddings
                themselves if None.
        """
        query, positive = embeddings[batch["query"]], embeddings[batch["positive"]]
        negatives = embeddings[batch["negatives"]]
        terms = {}
        if batch["task_type"] == "retrieval":
            terms["in_batch"] = in_batch_loss(
                query,
                positive if self.gather_gradients else positive.detach(),
                temperature=self.temperature,
                dims=self.dims,
                exclude=_duplicates(batch) if self.mask_duplicates else None,
            )
        terms["hard"] = hard_negative_loss(query, positive, negatives, temperature=self.temperature, dims=self.dims)
        if teacher is not None:
            roles = [batch[role] for role in ("query", "positive", "negatives")]
            student = embeddings if projected is None else projected
            losses = [distillation_loss(student[texts], teacher[texts]) for texts in roles]
            terms["distillation"] = self.distillation_weight * torch.stack(losses).sum()
        return terms


def _duplicates(batch: Mapping[str, Any]) -> Tensor:
    """Return ``(b, b)`` booleans: other rows whose positive must not be a negative of this row's query."""
    query, positive = batch["query"], batch["positive"]
    if "forms" in batch:
        query, positive = batch["forms"][query], batch["forms"][positive]
    same = (query[:, None] == query) | (positive[:, None] == positive) | (query[:, None] == positive)
    return same & ~torch.eye(len(query), dtype=torch.bool, device=query.device)
