"""What a stored precision makes of embeddings, as sentence-transformers quantizes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.util.quantization import quantize_embeddings

__all__ = ["calibrate", "quantized"]

# A dimension in which all embeddings are alike would be divided by nothing.
_LEAST_RANGE = 1e-6


def calibrate(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(2, d)`` smallest and largest value of each dimension of ``(n, d)`` embeddings, for int8."""
    low, high = embeddings.min(axis=0), embeddings.max(axis=0)
    return np.stack([low, np.maximum(high, low + _LEAST_RANGE)])


def quantized(embeddings: NDArray[np.float32], precision: str, ranges: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(n, d)`` what sentence-transformers stores in a precision, as floats that can be compared by cosine.

    Args:
        embeddings: ``(n, d)`` floats.
        precision: One of ``PRECISIONS``.
        ranges: ``(2, d)`` smallest and largest value of each dimension, for int8.
    """
    if precision == "float32":
        return embeddings
    if precision == "int8":
        # sentence-transformers does not clip: a value out of range would wrap around to the other end.
        clipped = np.clip(embeddings, ranges[0], ranges[1])
        return quantize_embeddings(clipped, "int8", ranges=ranges).astype(np.float32)
    packed = quantize_embeddings(embeddings, "ubinary")
    # Signs: their cosine orders vectors as the Hamming distance does.
    return np.unpackbits(packed, axis=1, count=embeddings.shape[1]).astype(np.float32) * 2 - 1
