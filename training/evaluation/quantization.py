"""What a vector index keeps of embeddings in a precision, taken back to floats."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sentence_transformers.util.quantization import quantize_embeddings

# How a stored precision is made, where there are several ways: FAISS's name of it.
QUANTIZERS = {"int8": "QT_8bit"}
# Steps between the smallest and the largest value of a dimension.
_STEPS = 255


def unit_length(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(n, d)`` embeddings of unit length; one of zeros stays as it is."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.divide(embeddings, lengths, out=np.zeros_like(embeddings), where=lengths > 0)


def calibrate(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """``(2, d)`` smallest and largest value of each dimension of ``(n, d)`` embeddings, for int8."""
    return np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])


def quantized(
    embeddings: NDArray[np.float32], precision: str, ranges: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """``(n, d)`` embeddings as they are after storing, as floats that can be compared by cosine.

    int8 is FAISS's ``ScalarQuantizer`` of type ``QT_8bit``: a code counts the steps from the least value of its
    dimension, and stands for the middle of its step. FAISS compares queries in float32 with vectors that are taken back
    from their codes, and so must the caller. The codes cannot be compared as they are: each dimension has another
    offset and another scale.

    For embeddings of unit length (:func:`unit_length`), cosine then finds what FAISS finds by ``METRIC_L2``. Its
    ``METRIC_INNER_PRODUCT`` finds less, because the lengths of the vectors taken back differ.

    Args:
        embeddings: ``(n, d)`` floats.
        precision: One of ``PRECISIONS``.
        ranges: ``(2, d)`` smallest and largest value of each dimension, for int8, to which others are cut; those of
            the embeddings if None.
    """
    if precision == "float32":
        return embeddings
    if precision == "int8":
        least, most = calibrate(embeddings) if ranges is None else ranges
        spread = most - least
        shares = np.divide(embeddings - least, spread, out=np.zeros_like(embeddings), where=spread > 0)
        codes = np.trunc(_STEPS * shares.clip(0, 1))
        return least + spread * ((codes + 0.5) / _STEPS)
    packed = quantize_embeddings(embeddings, "ubinary")
    # Signs: their cosine orders vectors as the Hamming distance does.
    return np.unpackbits(packed, axis=1, count=embeddings.shape[1]).astype(np.float32) * 2 - 1
