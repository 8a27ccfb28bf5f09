"""Embeddings computed once, and the precisions in which a vector index stores them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router

from training.models.devices import SharedEncoder
from training.models.encoders import exit_sizes

Floats = NDArray[np.float32]

# Steps between the smallest and the largest value of a dimension in int8.
_STEPS = 255
# From this many texts on, encoding shows a progress bar.
_LONG_WORK = 10_000


def unit_length(embeddings: Floats) -> Floats:
    """Normalize ``(n, d)`` embeddings; zeros stay zeros."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.divide(embeddings, lengths, out=np.zeros_like(embeddings), where=lengths > 0)


def calibrate(embeddings: Floats) -> Floats:
    """Return the ``(2, d)`` smallest and largest values of ``(n, d)`` embeddings by dimension, for int8."""
    return np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])


def quantized(embeddings: Floats, precision: str, ranges: Floats | None = None) -> Floats:
    """Store ``(n, d)`` embeddings in a precision and return them as floats that can be compared by cosine.

    int8 is FAISS's ``ScalarQuantizer`` of type ``QT_8bit``: a code counts the steps from the smallest value of its
    dimension and stands for the middle of its step. As in FAISS, compare float32 queries with the decoded vectors: each
    dimension has its own offset and scale. For unit vectors, cosine then finds what FAISS finds by ``METRIC_L2``; its
    inner product finds less, because the lengths of decoded vectors differ. Values are clipped to ``ranges``, from
    :func:`calibrate`; default: those of the embeddings.
    """
    if precision == "float32":
        return embeddings
    if precision == "int8":
        low, high = calibrate(embeddings) if ranges is None else ranges
        spread = high - low
        shares = np.divide(embeddings - low, spread, out=np.zeros_like(embeddings), where=spread > 0)
        codes = np.trunc(_STEPS * shares.clip(0, 1))
        return low + spread * ((codes + 0.5) / _STEPS)
    # As signs, their cosine orders vectors as the Hamming distance of packed bits does.
    return np.where(embeddings > 0, 1, -1).astype(np.float32)


class EmbeddingStore:
    """Encode each distinct pair of prompt and text once, at full width, for all tasks and views.

    mteb's ``CachedEmbeddingWrapper`` keeps a cache per task, on disk.
    """

    def __init__(self, model: SentenceTransformer | SharedEncoder, batch_size: int = 32) -> None:
        self.encoder = model if isinstance(model, SharedEncoder) else SharedEncoder(lambda: model)
        self.model, self.batch_size = self.encoder.model, batch_size
        self.encoded, self.seconds = 0, 0.0
        self.width = int(self.model.get_embedding_dimension())
        self.columns = self.width * (len(exit_sizes(self.model)) or 1)
        # Corpora and queries of the current task.
        self.read: dict[Any, Any] = {}
        self.routes = any(isinstance(module, Router) for module in self.model)
        self._rows: dict[tuple[str | None, str, str], int] = {}
        self._embeddings = np.empty((0, self.columns), np.float32)
        self._terminal = sys.stderr

    def encode(self, texts: Sequence[str], prompt: str, side: str | None = None) -> Floats:
        """Return the ``(n, columns)`` embeddings of texts: ``width``, or ``exits * width`` of a model with exits.

        A model with a router encodes a side, query or document.
        """
        side = side if self.routes else None
        if new := [text for text in dict.fromkeys(texts) if (side, prompt, text) not in self._rows]:
            self._add(new, prompt, side, self.compute(new, prompt, side))
        return self._embeddings[[self._rows[side, prompt, text] for text in texts]]

    def compute(self, texts: Sequence[str], prompt: str, side: str | None) -> Floats:
        """Return the ``(n, columns)`` embeddings of distinct texts, and keep none of them."""
        method = {"query": "encode_query", "document": "encode_document"}.get(side, "encode")
        # Not part of the time.
        self.encoder.start()
        started = time.perf_counter()
        # mteb's bars are hidden, ours is not.
        with redirect_stderr(self._terminal):
            # An empty prompt is given, too: otherwise sentence-transformers adds the default prompt.
            options = {"prompt": prompt, "show_progress_bar": len(texts) >= _LONG_WORK}
            found = self.encoder.encode(method, texts, self.batch_size, **options)
        self.seconds += time.perf_counter() - started
        self.encoded += len(texts)
        return found

    def _add(self, texts: Sequence[str], prompt: str, side: str | None, embeddings: Floats) -> None:
        self._rows.update(((side, prompt, text), number) for number, text in enumerate(texts, len(self._rows)))
        self._embeddings = np.concatenate([self._embeddings, embeddings])

    def forget(self, most_bytes: int = 0) -> None:
        """Drop the texts that were read, and the embeddings if they take more than ``most_bytes``."""
        self.read.clear()
        if self._embeddings.nbytes > most_bytes:
            self._rows.clear()
            self._embeddings = self._embeddings[:0]
