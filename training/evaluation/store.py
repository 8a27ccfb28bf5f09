"""Every text encoded once: embeddings by prompt and text, at full width."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router

Result = TypeVar("Result")

# So many texts get a progress bar of their own.
_LONG_WORK = 10_000


class EmbeddingStore:
    """Encodes every distinct pair of prompt and text once, at full width.

    Args:
        model: The model; it must not truncate.
        batch_size: Texts encoded at a time.

    Attributes:
        encoded: Number of texts that were encoded.
        seconds: Time that took.
    """

    def __init__(self, model: SentenceTransformer, batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = batch_size
        self.encoded = 0
        self.seconds = 0.0
        self._routes = any(isinstance(module, Router) for module in model)
        self._rows: dict[tuple[str | None, str, str], int] = {}
        self._embeddings = np.empty((0, self.width), np.float32)
        self._read: dict[Hashable, tuple[Any, Any]] = {}

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return int(self.model.get_embedding_dimension())

    @property
    def known(self) -> NDArray[np.float32]:
        """``(n, width)`` embeddings of all texts that are held."""
        return self._embeddings[: len(self._rows)]

    @property
    def texts_per_second(self) -> float | None:
        """Encoding rate; None before anything was encoded."""
        return self.encoded / self.seconds if self.encoded else None

    def encode(self, texts: Sequence[str], prompt: str, side: str | None = None) -> NDArray[np.float32]:
        """``(n, width)`` embeddings of the texts.

        Args:
            texts: ``n`` texts.
            prompt: Put before each of them; may be empty.
            side: ``query`` or ``document``, where texts are either; it matters to a model that treats them apart.
        """
        side = side if self._routes else None
        new = [text for text in dict.fromkeys(texts) if (side, prompt, text) not in self._rows]
        if new:
            started = time.perf_counter()
            encode = {"query": self.model.encode_query, "document": self.model.encode_document}.get(
                side, self.model.encode
            )
            # An empty prompt is given too: without one, sentence-transformers would put in the model's default.
            bar = len(new) >= _LONG_WORK
            found = encode(new, prompt=prompt, batch_size=self.batch_size, show_progress_bar=bar)
            self.seconds += time.perf_counter() - started
            self._keep(side, prompt, new, found)
        return self._embeddings[[self._rows[side, prompt, text] for text in texts]]

    def _keep(self, side: str | None, prompt: str, texts: Sequence[str], embeddings: NDArray[np.float32]) -> None:
        held = len(self._rows)
        needed = held + len(texts)
        if needed > len(self._embeddings):
            grown = np.empty((max(needed, 2 * held), self.width), np.float32)
            grown[:held] = self.known
            self._embeddings = grown
        self._embeddings[held:needed] = embeddings
        self._rows.update(((side, prompt, text), held + number) for number, text in enumerate(texts))
        self.encoded += len(texts)

    def once(self, key: Hashable, source: Any, read: Callable[[], Result]) -> Result:
        """What ``read`` returns, called once for a key until :meth:`forget`; the source is held, too.

        Args:
            key: What is asked for; may hold the ``id`` of the source, which stays its own while that is held.
            source: What is read.
            read: Reads it.
        """
        if key not in self._read:
            self._read[key] = (source, read())
        return self._read[key][1]

    def forget(self, most_bytes: int = 0) -> None:
        """Lets go of what was read, and of all embeddings if they take more than so many bytes."""
        self._read.clear()
        if self._embeddings.nbytes > most_bytes:
            self._rows.clear()
            self._embeddings = np.empty((0, self.width), np.float32)
