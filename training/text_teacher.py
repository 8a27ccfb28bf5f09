"""A teacher that is given texts: any SentenceTransformer, whatever its tokenizer and instruction format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from modeling_f2llm.prompts import TEMPLATE
from training.data.instructions import split_instruction
from training.data.prepared import PreparedSource
from training.errors import UserError, in_one_line
from training.gradient_cache import gather_texts

__all__ = ["TextFormat", "TextTeacher", "load_text_teacher"]

_QUERY, _DOCUMENT = f"{TEMPLATE}{{text}}", "{text}"


@dataclass(frozen=True)
class TextFormat:
    """How a teacher is given a text, with and without an instruction.

    Attributes:
        query_template: ``{instruction}`` and ``{text}`` are filled in where a text carries an instruction; None is the
            template of F2LLM.
        document_template: ``{text}`` is filled in where it carries none; None is the text as it is.

    Raises:
        UserError: If a template lacks ``{text}`` or has another field than these.
    """

    query_template: str | None = None
    document_template: str | None = None

    def __post_init__(self) -> None:
        _check_template("teacher_query_template", self.query_template, {"instruction", "text"})
        _check_template("teacher_document_template", self.document_template, {"text"})

    def apply(self, text: str) -> str:
        """Takes F2LLM's instruction off a text, if it has one, and puts the text into the teacher's template."""
        instruction, bare = split_instruction(text)
        if instruction is None:
            return (self.document_template or _DOCUMENT).format(text=bare)
        return (self.query_template or _QUERY).format(instruction=instruction, text=bare)


def _check_template(key: str, template: str | None, known: set[str]) -> None:
    if template is None:
        return
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(
            f"key {key!r}: {template!r} is no template ({error}); double every brace that is text"
        ) from None
    if "text" not in fields or fields - known:
        allowed = " and ".join(f"{{{name}}}" for name in sorted(known))
        raise UserError(f"key {key!r}: {template!r} must hold {{text}} and nothing in braces but {allowed}")


class TextTeacher:
    """A frozen SentenceTransformer without its last normalisation, over the kept texts of prepared sources.

    Args:
        model: The teacher; a ``Normalize`` at its end is taken off.
        text_format: How it is given texts.

    Attributes:
        width: Its dimensions ``D``.
    """

    def __init__(self, model: SentenceTransformer, text_format: TextFormat) -> None:
        while isinstance(model[-1], Normalize):
            del model[-1]
        self.model = model.eval().requires_grad_(False)
        self.text_format = text_format
        self.width: int = model.get_embedding_dimension()
        self._sources: dict[str, PreparedSource] = {}

    def described(self) -> dict[str, Any]:
        """What its embeddings depend on besides its weights."""
        text_format = self.text_format
        return {
            "query_template": text_format.query_template or _QUERY,
            "document_template": text_format.document_template or _DOCUMENT,
        }

    def use(self, sources: Sequence[PreparedSource]) -> None:
        """Says which sources batches are of; each must keep its texts."""
        self._sources = {source.name: source for source in sources}

    def to(self, device: torch.device) -> None:
        """Moves the model to a device."""
        self.model.to(device)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(n, D)`` unnormalised fp32 embeddings of texts, on the model's device.

        Raises:
            UserError: If an embedding is NaN or infinite.
        """
        formatted = [self.text_format.apply(text) for text in texts]
        embeddings = self.model.encode(formatted, convert_to_tensor=True, show_progress_bar=False).float()
        if not embeddings.isfinite().all():
            raise UserError(
                "key 'teacher': its embeddings are not all finite; choose another one, or train without bf16"
            )
        return embeddings

    def embed(self, batch: dict[str, Any], width: int | None = None) -> Tensor:
        """``(n, width)`` unnormalised embeddings of the batch's distinct texts, on every process.

        Args:
            batch: This process's part of the batch.
            width: Leading dimensions wanted; all ``D`` if None.
        """
        self.to(batch["input_ids"].device)
        texts = self._sources[batch["source"]].texts(batch["own_texts"])
        return gather_texts(self.encode(texts)[:, :width], batch)

    def embed_texts(self, source: PreparedSource, positions: np.ndarray) -> Tensor:
        """``(n, D)`` unnormalised embeddings, on the CPU, of the texts at ``(n,)`` positions of a source."""
        return self.encode(source.texts(positions)).cpu()


def load_text_teacher(name: str, text_format: TextFormat) -> TextTeacher:
    """Loads a SentenceTransformer as teacher, in fp32.

    Args:
        name: Folder or Hub name.
        text_format: How it is given texts.

    Raises:
        UserError: If it cannot be loaded.
    """
    try:
        return TextTeacher(SentenceTransformer(name, model_kwargs={"dtype": torch.float32}), text_format)
    # Damaged folders come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"key 'teacher': {name!r} cannot be used: {in_one_line(error)}") from None
