"""The training objectives of F2LLM as pure functions of unnormalised embeddings.

In-batch, hard-negative and distillation loss follow the released training code of F2LLM-v2 (the paper, arXiv
2603.19223, gives no formula for the matryoshka weights): cosine similarities over a temperature, cross-entropy against
the positive, averaged over rows and, under matryoshka learning, summed over the trained widths with falling weights.

Every width needs the cosine of the leading ``m`` dimensions. Dot products and squared norms are therefore accumulated
block by block, so that all widths together cost one pass over the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, repeat

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss
from torch.utils.checkpoint import checkpoint

from .configuration_f2llm import matryoshka_dims

__all__ = [
    "TEMPERATURE",
    "cosent_loss",
    "cosines",
    "distillation_loss",
    "false_negatives",
    "hard_negative_loss",
    "in_batch_loss",
    "matryoshka_dims",
    "matryoshka_weights",
    "score_distillation_loss",
]

TEMPERATURE = 0.05
# The floor of a vector's length that torch.nn.functional.normalize uses, squared.
_SMALLEST_SQUARED_NORM = 1e-24
# Cosines of equal texts, computed in other blocks, may differ so much: with a margin of 0, none is above the other.
_ROUNDING = 1e-5
# Cosines of an in-batch loss that are held at once. Each width keeps three fp32 matrices of them for the backward pass:
# all widths of a batch of 32,768 rows would be 100 GiB.
MOST_COSINES = 4096**2


def matryoshka_weights(dims: Sequence[int]) -> list[float]:
    """Weights of the widths ``dims`` (widest first) in the matryoshka sum.

    The k-th width ``m`` of a ``d``-dimensional embedding, counted from 1, weighs ``1 / (k * sqrt(d / m))``.

    Raises:
        ValueError: If the widths do not fall strictly.

    Example:
        >>> [round(weight, 3) for weight in matryoshka_weights([320, 256, 128])]
        [1.0, 0.447, 0.211]
    """
    if any(wide <= narrow for wide, narrow in pairwise(dims)):
        raise ValueError(f"matryoshka dimensions must fall strictly, got {list(dims)}")
    return [1 / (k * math.sqrt(dims[0] / dim)) for k, dim in enumerate(dims, start=1)]


def _paired_dots(query: Tensor, candidates: Tensor) -> Tensor:
    """``(n, d)`` and ``(n, k, d)`` → ``(n, k)``: each query against its own candidates."""
    return torch.einsum("nd,nkd->nk", query, candidates)


def _shared_dots(query: Tensor, candidates: Tensor) -> Tensor:
    """``(n, d)`` and ``(m, d)`` → ``(n, m)``: each query against all candidates."""
    return query @ candidates.T


def _prefix_cosines(
    query: Tensor, candidates: Tensor, dims: Sequence[int], dots_of: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Tensor]:
    """Yields the cosines of the leading ``m`` dimensions for each ``m`` of ``dims``, narrowest first."""
    dots: Tensor | float = 0.0
    query_norms: Tensor | float = 0.0
    candidate_norms: Tensor | float = 0.0
    ends = sorted(dims)
    widths = [end - start for start, end in pairwise([0, *ends])]
    # Split, not sliced: the gradient of a slice is a tensor of zeros as large as the whole.
    blocks = (states[..., : ends[-1]].split(widths, dim=-1) for states in (query, candidates))
    for q, c in zip(*blocks, strict=True):
        dots = dots + dots_of(q, c)
        query_norms = query_norms + q.square().sum(-1)
        candidate_norms = candidate_norms + c.square().sum(-1)
        query_scale = query_norms.clamp_min(_SMALLEST_SQUARED_NORM).rsqrt()
        yield dots * query_scale[:, None] * candidate_norms.clamp_min(_SMALLEST_SQUARED_NORM).rsqrt()


def _over_widths(
    query: Tensor,
    candidates: Tensor,
    dots_of: Callable[[Tensor, Tensor], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    dims: Sequence[int] | None,
) -> Tensor:
    """Sum of the weighted losses of the cosines of all widths."""
    width = query.shape[-1]
    dims = [width] if dims is None else list(dims)
    if not dims or max(dims) > width or min(dims) < 1:
        raise ValueError(f"matryoshka dimensions {dims} do not fit embeddings of {width} dimensions")
    if not len(query):
        return query.sum()
    weights = dict(zip(dims, matryoshka_weights(dims), strict=True))
    loss = query.new_zeros((), dtype=torch.float32)
    # Similarities in bf16 are too coarse for a temperature of 0.05.
    with torch.autocast(query.device.type, enabled=False):
        cosines = _prefix_cosines(query.float(), candidates.float(), dims, dots_of)
        for dim, cosine in zip(sorted(dims), cosines, strict=True):
            loss = loss + weights[dim] * loss_of(cosine)
    return loss


def _contrastive_loss(
    query: Tensor,
    candidates: Tensor,
    labels: Tensor,
    dots_of: Callable[[Tensor, Tensor], Tensor],
    temperature: float,
    dims: Sequence[int] | None,
    exclude: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the labels under cosine / temperature, averaged over rows and weighted over widths."""

    def loss_of(cosines: Tensor) -> Tensor:
        logits = cosines / temperature
        if exclude is not None:
            logits = logits.masked_fill(exclude, float("-inf"))
        return cross_entropy(logits, labels)

    return _over_widths(query, candidates, dots_of, loss_of, dims)


def _dots_with(candidates: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return _shared_dots if candidates.ndim == 2 else _paired_dots


def cosines(query: Tensor, candidates: Tensor) -> Tensor:
    """Return ``(n, m)`` or ``(n, k)`` fp32 cosines of queries with ``(m, d)`` shared or ``(n, k, d)`` own ones."""
    with torch.autocast(query.device.type, enabled=False):
        return next(_prefix_cosines(query.float(), candidates.float(), [query.shape[-1]], _dots_with(candidates)))


@torch.no_grad()
def false_negatives(query: Tensor, positive: Tensor, candidates: Tensor, margin: float) -> Tensor:
    """Find the candidates whose cosine with the query is above that of its positive by more than the margin.

    With a margin of 0.1 and the trained model's own embeddings it is the mask of Qwen3-Embedding (arXiv 2506.05176);
    with 0 and the embeddings of a guide, that of GISTEmbed (arXiv 2402.16829).

    Args:
        query: ``(n, d)`` embeddings.
        positive: ``(n, d)`` embeddings.
        candidates: ``(m, d)`` embeddings that all queries share, or ``(n, k, d)``, own ones of each.
        margin: Difference of cosines.

    Returns:
        ``(n, m)`` or ``(n, k)`` booleans.
    """
    return cosines(query, candidates) > cosines(query, positive[:, None]) + (margin + _ROUNDING)


def in_batch_loss(
    query: Tensor,
    positive: Tensor,
    *,
    temperature: float = TEMPERATURE,
    dims: Sequence[int] | None = None,
    labels: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """Contrasts each query's positive with the positives of all other rows.

    More than ``MOST_COSINES`` are computed block by block of queries, again in the backward pass.

    Args:
        query: ``(n, d)`` unnormalised query embeddings.
        positive: ``(m, d)`` unnormalised positives, those of other processes included.
        temperature: Divisor of the cosines.
        dims: Widths of matryoshka learning, widest first; None trains the full width only.
        labels: ``(n,)`` row of ``positive`` that belongs to each query; row ``i`` to query ``i`` by default.
        exclude: ``(n, m)`` boolean, true where a positive of another row is not a negative of this query.

    Returns:
        Scalar loss, averaged over the queries.

    Raises:
        ValueError: If a dimension does not fit the embeddings.
    """
    if labels is None:
        labels = torch.arange(len(query), device=query.device)
    rows = max(MOST_COSINES // max(len(positive), 1), 1)
    if len(query) <= rows:
        return _contrastive_loss(query, positive, labels, _shared_dots, temperature, dims, exclude)

    def of_block(query: Tensor, labels: Tensor, exclude: Tensor | None) -> Tensor:
        return len(query) * _contrastive_loss(query, positive, labels, _shared_dots, temperature, dims, exclude)

    excluded = repeat(None) if exclude is None else exclude.split(rows)
    blocks = zip(query.split(rows), labels.split(rows), excluded, strict=False)
    keys = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.stack([checkpoint(of_block, *block, **keys) for block in blocks]).sum() / len(query)


def hard_negative_loss(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None,
    *,
    temperature: float = TEMPERATURE,
    dims: Sequence[int] | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """Contrasts each query's positive with its own hard negatives.

    Args:
        query: ``(n, d)`` unnormalised query embeddings.
        positive: ``(n, d)`` unnormalised positives.
        negatives: ``(n, k, d)`` unnormalised hard negatives. With none (``k`` = 0, or None) the loss is zero.
        temperature: Divisor of the cosines.
        dims: Widths of matryoshka learning, widest first; None trains the full width only.
        exclude: ``(n, k)`` boolean, true where a query has no such negative; a query that has none adds a loss of zero.

    Returns:
        Scalar loss, averaged over the queries.

    Raises:
        ValueError: If a dimension does not fit the embeddings.
    """
    candidates = positive[:, None] if negatives is None else torch.cat([positive[:, None], negatives], dim=1)
    labels = torch.zeros(len(query), dtype=torch.long, device=query.device)
    if exclude is not None:
        exclude = torch.cat([torch.zeros_like(labels, dtype=torch.bool)[:, None], exclude], dim=1)
    return _contrastive_loss(query, candidates, labels, _paired_dots, temperature, dims, exclude)


def cosent_loss(
    query: Tensor,
    passage: Tensor,
    scores: Tensor,
    *,
    temperature: float = TEMPERATURE,
    dims: Sequence[int] | None = None,
) -> Tensor:
    """Orders the cosines of graded pairs as their scores: CoSENT (Su, 2022, https://kexue.fm/archives/8847).

    ``log(1 + sum of exp((cos_j - cos_i) / temperature) over all i, j with score_i > score_j)``.

    Args:
        query: ``(n, d)`` unnormalised embeddings.
        passage: ``(n, d)`` unnormalised embeddings of what each query is compared with.
        scores: ``(n,)`` scores, of which only the order counts; equal ones are not compared.
        temperature: Divisor of the cosines.
        dims: Widths of matryoshka learning, widest first; None trains the full width only.

    Returns:
        Scalar loss of all pairs together; zero where all scores are equal.

    Raises:
        ValueError: If a dimension does not fit the embeddings.
    """
    unordered = scores[:, None] <= scores

    def loss_of(cosines: Tensor) -> Tensor:
        logits = cosines / temperature
        differences = (logits.T - logits).masked_fill(unordered, float("-inf"))
        return torch.cat([logits.new_zeros(1), differences.flatten()]).logsumexp(dim=0)

    return _over_widths(query, passage[:, None], _paired_dots, loss_of, dims)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between a student and the leading dimensions of its teacher, both unnormalised.

    F2LLM-v2 adds this term for queries, positives and negatives with equal weight, at the student's full width only.

    Args:
        student: ``(…, d)`` embeddings; zero rows give zero.
        teacher: ``(…, D)`` embeddings of the same texts, ``D >= d``; no gradient flows into them.

    Returns:
        Scalar loss, averaged over all elements.

    Raises:
        ValueError: If the teacher is narrower than the student.
    """
    width = student.shape[-1]
    if teacher.shape[-1] < width:
        raise ValueError(f"the teacher's {teacher.shape[-1]} dimensions do not cover the student's {width}")
    if not student.numel():
        return student.sum()
    return mse_loss(student.float(), teacher[..., :width].detach().float())


def score_distillation_loss(
    query: Tensor,
    candidates: Tensor,
    scores: Tensor,
    *,
    temperature: float = TEMPERATURE,
    dims: Sequence[int] | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of a student's choice among candidates from a teacher's.

    ``sum of p * log(p / q)`` with ``p = softmax(scores)`` and ``q = softmax(cosines / temperature)``: Lin et al. (2020,
    arXiv 2010.11386), as DistillKLDivLoss of sentence-transformers, but without its factor ``temperature ** 2``: the
    contrastive terms, which it stands beside, have none.

    Args:
        query: ``(n, d)`` unnormalised query embeddings.
        candidates: ``(m, d)`` unnormalised embeddings that all queries share, or ``(n, k, d)``, own ones of each.
        scores: ``(n, m)`` or ``(n, k)`` scores of the teacher, already divided by its temperature; no gradient flows
            into them.
        temperature: Divisor of the cosines.
        dims: Widths of matryoshka learning, widest first; None trains the full width only. All learn the same scores.
        exclude: Booleans in the shape of ``scores``, true where a query has no such candidate.

    Returns:
        Scalar loss, averaged over the queries; zero for a query of one candidate.

    Raises:
        ValueError: If a dimension does not fit the embeddings.
    """

    def log_chances(logits: Tensor) -> Tensor:
        # Not minus infinity: a chance of zero times an infinite difference is not a number.
        lowest = torch.finfo(logits.dtype).min
        return log_softmax(logits if exclude is None else logits.masked_fill(exclude, lowest), dim=1)

    wanted = log_chances(scores.detach().float())

    def loss_of(cosines: Tensor) -> Tensor:
        return kl_div(log_chances(cosines / temperature), wanted, reduction="batchmean", log_target=True)

    return _over_widths(query, candidates, _dots_with(candidates), loss_of, dims)
