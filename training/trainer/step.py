"""One step: F2LLM's objective over a batch of any size, in the memory of one chunk, on any number of processes.

The loss of a contrastive batch needs all embeddings at once, but not all activations: the texts are encoded chunk by
chunk without a graph, the loss gives the gradient of every embedding, and each chunk is then encoded again to pass its
part of that gradient on to the weights (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", 2021). The last chunk's first pass keeps its graph, so a batch of one chunk is encoded once.

On several processes each encodes its share of the texts. The embeddings are gathered, every process computes the same
loss over all of them and takes from its gradient the part of its own texts: the sum of all processes' gradients is that
of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from modeling_f2llm.compression import quantize, spread_loss
from modeling_f2llm.losses import (
    TEMPERATURE,
    cosent_loss,
    cosines,
    distillation_loss,
    false_negatives,
    hard_negative_loss,
    in_batch_loss,
    matryoshka_weights,
    score_distillation_loss,
)
from training.common.keyed import keyed_bits, keyed_uniform
from training.models.adapters import adapter_draws_dropout
from training.models.encoding import batch_chunks, embed_chunk, gather_rows

_DROPOUT, _RANK = 31, 32


@dataclass(frozen=True)
class Objective:
    """F2LLM's objective: contrastive terms, and distillation where there is a teacher.

    Hard negatives train every task type but similarity, whose pairs are ordered by their scores; in-batch negatives
    train retrieval only: in clustering and classification the positives of other rows may be of the same class.
    """

    temperature: float = TEMPERATURE
    dims: Sequence[int] | None = None  # of matryoshka learning, widest first; None for the full width only
    # Leave another row's positive out of a row's in-batch negatives if it is the text of this row's positive or query,
    # or the rows share their query, in any spelling and with or without instruction; the published training keeps it.
    # One of a row's own several positives is always left out.
    mask_duplicates: bool = False
    # Without, positives do not learn from the in-batch term, as in the published training on several GPUs.
    gather_gradients: bool = True
    distillation_weight: float = 1.0
    # Leave out negatives, in the batch and hard ones, whose cosine with the query exceeds its positive's by more than
    # this: by the teacher's embeddings if there is one, else by the model's own, at full width.
    mask_false_negatives: float | None = None
    # Learn the teacher's choice among a batch's passages and among a row's own candidates: its cosines say what is
    # alike, whatever the task. Without a teacher, learn the scores that the data has of a row's own candidates.
    score_distillation_weight: float = 0.0
    teacher_temperature: float = TEMPERATURE
    # Of retrieval only: elsewhere the queries or passages of two rows may be alike.
    spread_weight: float = 0.0
    # Factors of the contrastive terms on quantized embeddings, by precision.
    quantized: Mapping[str, float] = field(default_factory=dict)

    def terms(
        self,
        embeddings: Tensor,
        batch: Mapping[str, Any],
        teacher: Tensor | None = None,
        projected: Tensor | None = None,
        noted: dict[str, Tensor] | None = None,
        judge: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the terms of the loss by name; the loss is their sum.

        ``embeddings`` are the ``(n, d)`` unnormalised ones of the batch's distinct texts, ``teacher`` the ``(n, D)`` of
        a teacher. Its leading dimensions are compared with ``projected``, ``(n, d')``, or with the embeddings if None.
        ``noted`` takes what is no loss: ``masked_candidates``, the share that ``mask_false_negatives`` leaves out, by
        ``judge``, ``(n, d'')``, if there is no teacher; None: by the embeddings.
        """
        # A missing negative, -1, takes some text's embedding, which the loss leaves out.
        missing = left_out = batch["negatives"] < 0
        others = _no_negatives(batch, self.mask_duplicates)
        if self.mask_false_negatives is not None and batch["task_type"] != "similarity":
            judge = teacher if teacher is not None else (embeddings if judge is None else judge).detach()
            others, left_out, share = _with_false_negatives(batch, judge, others, missing, self.mask_false_negatives)
            if noted is not None:
                noted["masked_candidates"] = share
        terms = self._contrastive(embeddings, embeddings, batch, self.dims, others, left_out)
        for precision, weight in self.quantized.items():
            terms[precision] = weight * self._quantized(precision, embeddings, batch, others, left_out)
        if self.spread_weight and batch["task_type"] == "retrieval":
            sides = [spread_loss(embeddings[texts], dims=self.dims, exclude=near) for texts, near in _sides(batch)]
            terms["spread"] = self.spread_weight * torch.stack(sides).sum()
        if teacher is not None and self.distillation_weight:
            roles = [batch["query"], batch["positive"], batch["negatives"][~missing]]
            student = embeddings if projected is None else projected
            losses = [distillation_loss(student[texts], teacher[texts]) for texts in roles]
            terms["distillation"] = self.distillation_weight * torch.stack(losses).sum()
        if self.score_distillation_weight and (teacher is not None or "candidate_scores" in batch):
            term = self._score_distillation(embeddings, batch, teacher)
            terms["score_distillation"] = self.score_distillation_weight * term
        return terms

    def _contrastive(
        self,
        queries: Tensor,
        documents: Tensor,
        batch: Mapping[str, Any],
        dims: Sequence[int] | None,
        others: Tensor | None,
        left_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return the contrastive terms of texts whose ``(n, d)`` embeddings may differ by their role.

        ``others``, ``(b, b)``, and ``left_out``, ``(b, k)``, say which positives and hard ones are no negatives.
        """
        query, positive = queries[batch["query"]], documents[batch["positive"]]
        keys, terms = {"temperature": self.temperature, "dims": dims}, {}
        if batch["task_type"] == "similarity":
            return {"similarity": cosent_loss(query, positive, batch["scores"], **keys)}
        if batch["task_type"] == "retrieval":
            reached = positive if self.gather_gradients else positive.detach()
            terms["in_batch"] = in_batch_loss(query, reached, exclude=others, **keys)
        negatives = documents[batch["negatives"]]
        terms["hard"] = hard_negative_loss(query, positive, negatives, exclude=left_out, **keys)
        return terms

    def _quantized(
        self, precision: str, embeddings: Tensor, batch: Mapping[str, Any], others: Tensor | None, left_out: Tensor
    ) -> Tensor:
        """Return the sum of the contrastive terms, every width quantized by itself, as truncated vectors are."""
        stored = torch.cat([batch["positive"], batch["negatives"][batch["negatives"] >= 0]])
        dims, losses = [embeddings.shape[1]] if self.dims is None else self.dims, []
        for dim, weight in zip(dims, matryoshka_weights(dims), strict=True):
            texts = quantize(embeddings[:, :dim], precision, stored)
            losses += [weight * term for term in self._contrastive(*texts, batch, None, others, left_out).values()]
        return torch.stack(losses).sum()

    def _score_distillation(self, embeddings: Tensor, batch: Mapping[str, Any], teacher: Tensor | None) -> Tensor:
        query, own = batch["query"], torch.cat([batch["positive"][:, None], batch["negatives"]], dim=1)
        if teacher is None:
            # Rows of which fewer than two candidates have scores are not averaged over.
            scored = (~batch["candidate_scores"].isnan()).sum(dim=1) > 1
            scores = batch["candidate_scores"][scored]
            compared = [(query[scored], own[scored], scores, scores.isnan())]
        else:
            roles = (batch["positive"], own)
            compared = [(query, texts, cosines(teacher[query], teacher[texts]), texts < 0) for texts in roles]
        losses = [
            score_distillation_loss(
                *(embeddings[queries], embeddings[candidates], scores / self.teacher_temperature),
                **{"temperature": self.temperature, "dims": self.dims, "exclude": exclude},
            )
            for queries, candidates, scores, exclude in compared
        ]
        return torch.stack(losses).sum()


def _with_false_negatives(
    batch: Mapping[str, Any], judge: Tensor, others: Tensor | None, missing: Tensor, margin: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Add false negatives by ``(n, D)`` embeddings to the ``(b, b)`` others and ``(b, k)`` hard ones that are left out.

    Return both masks, and the share of candidates that were added.
    """
    query, positive = judge[batch["query"]], judge[batch["positive"]]
    false = false_negatives(query, positive, judge[batch["negatives"]], margin) & ~missing
    found, candidates = false.sum(), (~missing).sum()
    if batch["task_type"] == "retrieval":
        there = ~torch.eye(len(query), dtype=torch.bool, device=query.device)
        there = there if others is None else there & ~others
        in_batch = false_negatives(query, positive, positive, margin) & there
        others = in_batch if others is None else others | in_batch
        found, candidates = found + in_batch.sum(), candidates + there.sum()
    return others, missing | false, found / candidates.clamp_min(1)


def _no_negatives(batch: Mapping[str, Any], mask_duplicates: bool) -> Tensor | None:
    """Return ``(b, b)`` booleans: other rows whose positive must not be a negative of this row's query."""
    query, positive = batch["query"], batch["positive"]
    if "forms" in batch:
        query, positive = batch["forms"][query], batch["forms"][positive]
    same = torch.zeros(len(query), len(query), dtype=torch.bool, device=query.device)
    if mask_duplicates:
        same |= (query[:, None] == query) | (positive[:, None] == positive) | (query[:, None] == positive)
    elif "own_forms" not in batch:
        return None
    # Column by column: all pairs of positives of a large batch would take much memory.
    for own in batch["own_forms"].unbind(1) if "own_forms" in batch else ():
        same |= own[:, None] == positive
    return same & ~torch.eye(len(query), dtype=torch.bool, device=query.device)


def _sides(batch: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ``(n,)`` distinct queries, then positives, and ``(n, n)`` booleans: pairs that are related.

    Texts are related if rows of theirs are: those share a query or a positive, or one's positive is the other's query
    or another positive of its row.
    """
    related = _no_negatives(batch, mask_duplicates=True)
    one, other = (related | related.T | torch.eye(len(related), dtype=torch.bool, device=related.device)).nonzero().T
    for texts in (batch["query"], batch["positive"]):
        distinct, place = texts.unique(return_inverse=True)
        near = torch.zeros(len(distinct), len(distinct), dtype=torch.bool, device=texts.device)
        near[place[one], place[other]] = True
        yield distinct, near


def draw_rank(ranks: Sequence[int], *key: int) -> int:
    """Draw one of ascending ranks, each as often as its share of their sum, as ML-Embed's code (arXiv 2605.15081)."""
    ends = np.cumsum(ranks)
    return ranks[int(np.searchsorted(ends, keyed_uniform(_RANK, *key) * ends[-1], side="right"))]


def draws_dropout(model: Any) -> bool:
    """Return whether an unwrapped model draws dropout in training, in its attention or in an adapter."""
    return bool(model.config.attention_dropout) or adapter_draws_dropout(model)


class CachedStep(NamedTuple):
    """Forward and backward pass of one global batch."""

    accelerator: Accelerator
    model: nn.Module
    context: Callable[[], AbstractContextManager]  # makes that of a forward pass, such as autocast
    # Numbers that name this step: dropout is drawn by them, so that both passes of a chunk draw the same.
    key: tuple[int, ...] = ()
    exit_layers: Sequence[int] | None = None  # embeddings of these side by side, ``(n, exits * d)``

    def run(self, batch: dict[str, Any], loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of the loss in the model's parameters.

        ``batch`` is this process's part of the batch, from :class:`~training.trainer.batches.PackedCollator`;
        ``loss_of`` gives the scalar loss of the ``(n, d)`` embeddings of the whole batch, and may raise to stop the
        step. Return the detached loss of the global batch, the same on every process, and the ``(n,)`` lengths of the
        gradients that its texts' embeddings received.
        """
        *early, last = enumerate(batch_chunks(batch))
        with torch.no_grad():
            cached = [self._embed(*chunk) for chunk in early]
        # Of several backward passes only the last reduces the gradient over processes, unless weights are sharded.
        with self._accumulating(bool(early)):
            graph = self._embed(*last)
            own = torch.cat([*cached, graph.detach()])
            gathered = gather_rows(own, batch["max_rows_per_rank"]).requires_grad_()
            loss = loss_of(gathered[batch["slots"]])
            loss.backward()
            # Nothing of the whole batch's size but the gradient outlives the loss.
            gradient, gathered, own, cached = gathered.grad, None, None, None
            counts = [len(lengths) for _, (_, lengths) in (*early, last)]
            pieces = self._own(gradient, sum(counts)).split(counts)
            self._backward(graph, pieces[-1])
        del graph
        for chunk, piece in zip(early, pieces, strict=False):
            with self._accumulating(chunk is not early[-1]):
                self._backward(self._embed(*chunk), piece)
        return loss.detach(), gradient.norm(dim=1)[batch["slots"]]

    def _embed(self, number: int, chunk: tuple[Tensor, list[int]]) -> Tensor:
        device, drops = self.accelerator.device, draws_dropout(self.accelerator.unwrap_model(self.model))
        with self.context(), torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=drops):
            if drops:
                torch.manual_seed(int(keyed_bits(_DROPOUT, *self.key, self.accelerator.process_index, number)))
            return embed_chunk(self.model, *chunk, self.exit_layers).float()

    def _own(self, gradient: Tensor, count: int) -> Tensor:
        """Return this process's part of the gathered gradient, times the processes, as the reduction averages."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return gradient
        first = self.accelerator.process_index * (len(gradient) // processes)
        return gradient[first : first + count] * processes

    def _backward(self, embeddings: Tensor, grad: Tensor) -> None:
        # A scalar whose gradient is the given one: accelerate's engines start from a loss.
        self.accelerator.backward((embeddings * grad).sum())

    def _accumulating(self, accumulates: bool) -> AbstractContextManager:
        # DeepSpeed's engine reads the flag; DDP the context. FSDP would keep whole gradients until they are reduced.
        self.accelerator.gradient_state._set_sync_gradients(not accumulates)
        keeps = accumulates and not self.accelerator.is_fsdp2
        return self.accelerator.no_sync(self.model) if keeps else nullcontext()
