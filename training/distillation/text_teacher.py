"""A teacher that reads texts rather than the student's tokens: any SentenceTransformer, whatever its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from torch import Tensor

from training.common.errors import UserError, in_one_line
from training.data.prepared import PreparedSource
from training.data.text_format import TextFormat
from training.models.encoders import load_encoder
from training.models.encoding import gather_texts
from training.models.reference import resolve
from training.models.settings import reads_as_ours

_AS_KEPT = TextFormat()
# Of different lengths, so that a tokenizer that cannot pad is found out.
_SAMPLE = ("a", "a longer text, with an instruction or without")


class TextTeacher:
    """A frozen SentenceTransformer over the texts that were kept beside the student's tokens.

    Args:
        model: The teacher, changed in place: frozen, in fp32, and without the normalisation at its end.
        text_format: How it wants its texts.
        revision: What the model is now (:func:`~training.models.model_identity.model_revision`), if anyone will ask.
        batch_size: Texts at once.

    Attributes:
        width: Dimensions of its embeddings.
        identity: Changes with everything that its embeddings depend on: revision, templates and longest text.

    Raises:
        UserError: If it cannot embed texts.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "tea": 1}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=8)], device="cpu")
        >>> TextTeacher(model).encode(["tea", "more tea"]).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        model: SentenceTransformer,
        text_format: TextFormat = _AS_KEPT,
        revision: str = "",
        batch_size: int = 32,
    ) -> None:
        names = [name for name, _ in model.named_children()]
        while len(names) > 1 and isinstance(model.get_submodule(names[-1]), Normalize):
            delattr(model, names.pop())
        self.model = model.float().eval().requires_grad_(False)
        self.text_format = text_format
        self.batch_size = batch_size
        self.identity = text_teacher_identity(revision, text_format, model.max_seq_length)
        self.width = self._embed(_SAMPLE).shape[1]
        self._sources: dict[str, PreparedSource] = {}

    def use(self, sources: Sequence[PreparedSource]) -> None:
        """Says which sources the batches are of; each has kept its texts."""
        self._sources = {source.name: source for source in sources}

    def to(self, device: torch.device) -> None:
        """Moves the model to a device."""
        self.model.to(device)

    def embed(self, batch: dict[str, Any], width: int | None = None) -> Tensor:
        """``(n, width)`` unnormalised embeddings of the batch's distinct texts, on every process; see :meth:`encode`.

        Args:
            batch: This process's part of the batch.
            width: Leading dimensions wanted; all if None.
        """
        self.to(batch["input_ids"].device)
        return gather_texts(
            self.embed_texts(self._sources[batch["source"]], np.asarray(batch["own_texts"]))[:, :width], batch
        )

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(n, width)`` unnormalised fp32 embeddings of texts as they are kept, on the model's device.

        Args:
            texts: Texts as the student reads them; those with an instruction are put in the query template, the others
                in the document template.

        Raises:
            UserError: If an embedding is not finite.
        """
        if not len(texts):
            return torch.zeros(0, self.width, device=self.model.device)
        embeddings = self._embed([self.text_format.apply(text) for text in texts])
        finite = embeddings.isfinite().all(dim=1)
        if not finite.all():
            text = texts[int((~finite).nonzero()[0])]
            raise UserError(
                f"key 'teacher': its embedding of the text {text[:50]!r} is not finite; choose another teacher"
            )
        return embeddings

    def embed_texts(self, source: PreparedSource, positions: np.ndarray) -> Tensor:
        """``(n, width)`` embeddings of a source's texts, in the order of their positions; see :meth:`encode`.

        Args:
            source: A prepared source with texts.
            positions: ``(n,)`` positions among its texts.

        Raises:
            UserError: If the source has no texts or an embedding is not finite.
        """
        return self.encode(source.texts(positions))

    def _embed(self, texts: Sequence[str]) -> Tensor:
        # The templates are the prompt: one that the model would put before texts by itself is left out.
        found = self.model.encode(
            list(texts), prompt="", batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True
        )
        # A tensor made in inference mode cannot be part of a loss that has a gradient; its copy can.
        return found.float().clone()


def text_teacher_identity(revision: str, text_format: TextFormat, max_length: int | None) -> str:
    """Changes with everything that a text teacher's embeddings depend on.

    Args:
        revision: What the model is (:func:`~training.models.model_identity.model_revision`).
        text_format: How it wants its texts.
        max_length: Tokens of a text at most.
    """
    described = {"revision": revision, "format": asdict(text_format), "max_length": max_length}
    return blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()


def load_text_teacher(
    name: str,
    text_format: TextFormat = _AS_KEPT,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    batch_size: int = 32,
) -> TextTeacher:
    """Loads a teacher that reads texts.

    Args:
        name: Folder or Hub name of a SentenceTransformer, or of a model that it can make one of.
        text_format: How it wants its texts.
        device: Where it runs; chosen by sentence-transformers if None.
        trust_remote_code: Run code that comes with the model.
        batch_size: Texts at once.

    Raises:
        UserError: If there is no such model or it cannot embed texts.
    """
    key = "key 'teacher'"
    found = resolve(name, key)
    model = load_encoder(
        found,
        key,
        trust_remote_code=trust_remote_code,
        device=None if device is None else str(device),
        model_kwargs={"dtype": torch.float32},
    )
    # A plain Qwen3 was pooled by mean once: what was embedded then is no longer its own.
    identity = f"{found.identity} lasttoken" if reads_as_ours(found.place, found.revision) else found.identity
    try:
        return TextTeacher(model, text_format, identity, batch_size)
    # What cannot pad or embed fails in as many ways as there are modules.
    except Exception as error:
        raise UserError(f"{key}: {name!r} cannot be used: {in_one_line(error)}") from None
