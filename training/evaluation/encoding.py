"""Models as mteb sees them: every text encoded once, each width and precision a view of the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from training.errors import UserError
from training.evaluation.records import PRECISIONS

__all__ = ["EmbeddingStore", "EncoderView", "quantized"]


class EmbeddingStore:
    """Encodes every distinct pair of prompt and text once, at full width.

    Args:
        model: The model; it must not truncate.
        batch_size: Texts encoded at a time.
    """

    def __init__(self, model: SentenceTransformer, batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = batch_size
        self.encoded = 0
        self._known: dict[tuple[str, str], NDArray[np.float32]] = {}

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return int(self.model.get_embedding_dimension())

    def encode(self, texts: Sequence[str], prompt: str, show_progress_bar: bool = False) -> NDArray[np.float32]:
        """``(n, width)`` embeddings of the texts."""
        new = [text for text in dict.fromkeys(texts) if (prompt, text) not in self._known]
        if new:
            # An empty prompt is given too: without one, sentence-transformers would put in the model's default.
            found = self.model.encode(
                new, prompt=prompt, batch_size=self.batch_size, show_progress_bar=show_progress_bar
            )
            self._known.update(zip(((prompt, text) for text in new), found.astype(np.float32), strict=True))
            self.encoded += len(new)
        return np.stack([self._known[prompt, text] for text in texts])


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


class EncoderView(AbsEncoder):
    """An mteb encoder: leading dimensions of a store's embeddings in a precision.

    Args:
        store: The embeddings.
        meta: What mteb knows of the model, without the view.
        dimension: Leading dimensions used.
        precision: One of ``PRECISIONS``.
        prompts: By mteb's key (task, type of task or ``query``), what to put before queries.
        template: Holds ``{instruction}``; None if the prompts are whole. Not used for documents.

    Raises:
        UserError: If the dimension is not one of the model's.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        meta: ModelMeta,
        dimension: int,
        precision: str = "float32",
        prompts: dict[str, Any] | None = None,
        template: str | None = None,
    ) -> None:
        if not 1 <= dimension <= store.width:
            raise UserError(f"dimension {dimension}: {meta.name} has {store.width}; choose from 1 to {store.width}")
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r} is not known; choose from {', '.join(PRECISIONS)}")
        self.store, self.dimension, self.precision = store, dimension, precision
        self.model, self.prompts_dict, self.instruction_template = store.model, prompts, template
        self._ranges: dict[tuple[str, str, str], NDArray[np.float32]] = {}
        # Part of the address of a result in mteb's cache: views must not share one.
        experiment = {**(meta.experiment_kwargs or {}), "dimension": dimension, "precision": precision}
        full = dimension == store.width and precision == "float32"
        self.mteb_model_meta = meta if full else meta.model_copy(update={"experiment_kwargs": experiment})

    def prompt(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """What is put before a text: the task's prompt, none for a document."""
        if prompt_type == PromptType.document:
            return self.model.prompts.get("document") or "" if self.instruction_template is None else ""
        if self.instruction_template is None:
            return self.model.prompts.get("query") or ""
        return self.get_task_instruction(task_metadata, prompt_type)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """``(n, dimension)`` embeddings of mteb's batches of texts."""
        texts = [text for batch in inputs for text in batch["text"]]
        found = self.store.encode(texts, self.prompt(task_metadata, prompt_type))[:, : self.dimension]
        key = (task_metadata.name, hf_split, hf_subset)
        # Queries and documents of a task must share a scale.
        ranges = self._ranges.setdefault(key, np.stack([found.min(axis=0), found.max(axis=0)]))
        return quantized(found, self.precision, ranges)
