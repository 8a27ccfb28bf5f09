"""Embeddings of several tasks on disk, where every process of a launch finds what another has computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from training.common.outputs import whole_file
from training.evaluation.encoding import EmbeddingStore, Floats
from training.models.devices import SharedEncoder


class EmbeddingCache:
    """Rows of key and embedding in files that are whole or absent; the key is a digest of side, prompt and text.

    mteb's ``CachedEmbeddingWrapper`` keeps a cache per task, without the prompt in its keys, for one process.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self._row = folder, np.dtype([("key", "V16"), ("embedding", "<f4", (width,))])
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    @staticmethod
    def key(text: str, prompt: str, side: str | None) -> bytes:
        """Return the key of a text, 16 bytes."""
        return xxh3_128_digest("\0".join((side or "", prompt, text)).encode())

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Hold what is on disk, whichever process has written it; embeddings are read when they are asked for."""
        files = [np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("[!.]*.npy"))]
        self._embeddings = [rows["embedding"].view(np.ndarray) for rows in files]
        self._places = {
            key: (number, row) for number, rows in enumerate(files) for row, key in enumerate(rows["key"].tolist())
        }

    def close(self) -> None:
        """Hold nothing: an open file would take its place on the disk after it is deleted, by any process."""
        self._embeddings, self._places = [], {}

    def clear(self) -> None:
        """Delete all files."""
        self.close()
        for path in self.folder.iterdir():
            path.unlink()

    def add(self, keys: Sequence[bytes], embeddings: Floats) -> None:
        """Write the ``(n, width)`` embeddings of ``n`` keys as one file."""
        rows = np.empty(len(keys), self._row)
        rows["key"], rows["embedding"] = np.array(keys, self._row["key"]), embeddings
        name = xxh3_128_hexdigest(b"".join(keys))
        with whole_file(self.folder / f"{name}.npy") as partial, partial.open("wb") as file:
            np.save(file, rows)

    def read(self, keys: Sequence[bytes]) -> Floats:
        """Return the ``(n, width)`` embeddings of keys that are in the cache."""
        found = np.empty((len(keys), *self._row["embedding"].shape), np.float32)
        for position, (number, row) in enumerate(map(self._places.__getitem__, keys)):
            found[position] = self._embeddings[number][row]
        return found


class CachedStore(EmbeddingStore):
    """An :class:`EmbeddingStore` that looks texts up in a cache before it encodes them."""

    def __init__(self, model: SentenceTransformer | SharedEncoder, cache: EmbeddingCache, batch_size: int = 32) -> None:
        super().__init__(model, batch_size)
        self.cache = cache
        # Then prompt and text are to the model what their concatenation is, and batches may mix prompts. Pooling may
        # leave the prompt out, and chat templates give it a message of its own.
        self._joins = all(
            getattr(module, "include_prompt", True) and "message" not in getattr(module, "modality_config", ())
            for module in self.model
        )

    def as_encoded(self, texts: Sequence[str], prompt: str, side: str | None) -> tuple[list[str], str, str | None]:
        """Return texts, prompt and side as the model gets them: the prompt before each text, where that is the same."""
        side = side if self.routes else None
        return ([prompt + text for text in texts], "", side) if self._joins else (list(texts), prompt, side)

    def encode(self, texts: Sequence[str], prompt: str, side: str | None = None) -> Floats:
        """Return the ``(n, columns)`` embeddings of texts, as :meth:`EmbeddingStore.encode` does."""
        texts, prompt, side = self.as_encoded(texts, prompt, side)
        keys = {text: self.cache.key(text, prompt, side) for text in texts if (side, prompt, text) not in self._rows}
        if known := {text: key for text, key in keys.items() if key in self.cache}:
            self._add(list(known), prompt, side, self.cache.read(list(known.values())))
        return super().encode(texts, prompt, side)
