"""Objectives for embeddings that will be stored in few bits: spread out, and trained as the index will see them.

Pure functions of unnormalised embeddings, as those of :mod:`~modeling_f2llm.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .losses import matryoshka_weights

__all__ = ["PRECISIONS", "quantize", "spread_loss"]

# Below float32, those of a vector index that training can see.
PRECISIONS = ("int8", "binary")
# Steps between the smallest and the largest value of a dimension in int8.
_STEPS = 255


def spread_loss(texts: Tensor, *, dims: Sequence[int] | None = None, exclude: Tensor | None = None) -> Tensor:
    """Spreads unrelated texts over the sphere: global orthogonal regularisation (Zhang et al., arXiv 1708.06320).

    ``M1 ** 2 + max(0, M2 - 1 / d)`` with the mean ``M1`` and the second moment ``M2`` of the cosines of all pairs. For
    uniformly distributed vectors of ``d`` dimensions they are 0 and ``1 / d``. EmbeddingGemma (arXiv 2509.20354) has
    the second moment only.

    Args:
        texts: ``(n, d)`` unnormalised embeddings of distinct texts.
        dims: Widths of matryoshka learning, widest first; None trains the full width only.
        exclude: ``(n, n)`` symmetric boolean, true for two texts that are related. A text is no pair with itself.

    Returns:
        Scalar loss; zero where there is no pair.
    """
    pairs = ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    if exclude is not None:
        pairs &= ~exclude
    count = pairs.sum().clamp_min(1)
    dims = [texts.shape[-1]] if dims is None else dims
    loss = texts.new_zeros((), dtype=torch.float32)
    with torch.autocast(texts.device.type, enabled=False):
        for width, weight in zip(dims, matryoshka_weights(dims), strict=True):
            vectors = normalize(texts[:, :width].float(), dim=-1)
            cosines = (vectors @ vectors.T).masked_fill(~pairs, 0.0)
            mean, second_moment = cosines.sum() / count, cosines.square().sum() / count
            loss = loss + weight * (mean.square() + (second_moment - 1 / width).relu())
    return loss


def quantize(embeddings: Tensor, precision: str, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return texts as an index sees them, as queries and as documents, with a gradient in spite of the rounding.

    The values are those of an evaluation, for comparison by cosine. int8 is FAISS's ``QT_8bit`` of unit vectors beside
    float queries: 255 steps between the smallest and the largest value of a dimension, here of the batch's documents.
    Binary is the sign, of queries, too. The gradient passes by the rounding, as in pplx-embed (arXiv 2602.11151): in
    int8 it is that of the unit vector, as no document lies outside of the range; in binary that of
    ``tanh(value / root mean square of the vector)``, which fades for values far from zero. There the published model
    takes the tanh of the value itself, whose scale nothing fixes in ours.

    Args:
        embeddings: ``(n, d)`` unnormalised embeddings.
        precision: One of :data:`PRECISIONS`.
        documents: ``(m,)`` rows that are stored; the others may be meaningless as documents.

    Returns:
        ``(n, d)`` queries and ``(n, d)`` documents.
    """
    vectors = normalize(embeddings.float(), dim=-1)
    if precision == "binary":
        soft = torch.tanh(vectors * math.sqrt(vectors.shape[-1]))
        bits = torch.where(vectors > 0, 1.0, -1.0) + (soft - soft.detach())
        return bits, bits
    low, high = vectors.detach()[documents].aminmax(dim=0)
    step = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.trunc(_STEPS * ((vectors.detach() - low) / step).clamp(0, 1))
    decoded = low + (high - low) * ((codes + 0.5) / _STEPS)
    return vectors, decoded + (vectors - vectors.detach())
