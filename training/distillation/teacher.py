"""Frozen teachers: one that reads the student's own tokens, and any SentenceTransformer, which reads texts."""

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
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_f2llm.tokenizer import append_eos
from training.common.errors import UserError
from training.data.instructions import TextFormat
from training.data.prepared import PreparedSource
from training.models.encoders import load_encoder
from training.models.encoding import embed_batch, embed_chunk, gather_texts, packed_texts
from training.models.loading import load_whole_model
from training.models.model_folder import user_error
from training.models.model_ref import ModelRef, is_plain, model_type, reads_as_ours, resolve, why_not_last_token

# As messages call the teacher.
KEY = "key 'teacher'"
_TOKENS_AT_ONCE = 16_384
# Texts that differ in script, length and merges, to tell tokenizers apart.
_PROBES = ("", "a", "Where do giant pandas live?\nQuery: 大熊猫", " größer  שלום 12345 🙂")
_AS_KEPT = TextFormat()
# Of different lengths, which a tokenizer that cannot pad fails on.
_SAMPLE = ("a", "a longer text, with an instruction or without")


class Teacher:
    """A frozen model over the student's own tokens.

    ``max_tokens`` limits a forward pass over texts of a source. ``width`` is the number of its dimensions, ``D``.
    """

    def __init__(self, model: PreTrainedModel, max_tokens: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.width: int = model.config.hidden_size
        self._max_tokens = max_tokens or _TOKENS_AT_ONCE

    def embed(self, batch: dict[str, Any], width: int | None = None) -> Tensor:
        """``(n, width)`` unnormalised embeddings of the batch's distinct texts, on every process."""
        self.model.to(batch["input_ids"].device)
        return embed_batch(self.model, batch, width)

    @torch.no_grad()
    def embed_texts(self, source: PreparedSource, positions: np.ndarray) -> Tensor:
        """``(n, D)`` unnormalised embeddings, on the CPU, of the texts at ``(n,)`` ascending positions of a source."""
        embeddings = torch.empty(len(positions), self.width)
        for texts in packed_texts(source, positions, self._max_tokens):
            found = embed_chunk(self.model, texts.input_ids.to(self.model.device), texts.lengths)
            embeddings[np.searchsorted(positions, texts.positions)] = found.float().cpu()
        return embeddings


def reads_tokens_of(teacher: ModelRef, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a teacher can be given the student's token ids and be read at its last token.

    It must be a Qwen3 model with last-token pooling and nothing after it but normalisation, whose tokenizer turns texts
    into the ids of the student's, their end included.
    """
    try:
        if model_type(teacher) != "qwen3" or why_not_last_token(teacher) is not None:
            return False
        theirs = AutoTokenizer.from_pretrained(teacher.place, revision=teacher.revision, trust_remote_code=False)
        if is_plain(teacher):
            # A plain model does not say how texts end.
            append_eos(theirs)
    # from_pretrained can raise any exception on a corrupt folder; loading the model reports it.
    except Exception:
        return False
    same = theirs.get_vocab() == tokenizer.get_vocab()
    return same and all(theirs(text).input_ids == tokenizer(text).input_ids for text in _PROBES)


def load_teacher(teacher: ModelRef, **model_options: Any) -> PreTrainedModel:
    """Load a teacher that :func:`reads_tokens_of` the student."""
    with user_error(f"{KEY}: {teacher.name!r} cannot be used"):
        return load_whole_model(teacher.place, revision=teacher.revision, **model_options)


class TextTeacher:
    """A frozen SentenceTransformer over the texts that were kept beside the student's tokens.

    The model is changed in place: frozen, in fp32, and without the normalisation at its end. ``identity`` changes with
    all that the embeddings depend on: the model's own identity, given as ``revision``, templates and longest text.
    """

    def __init__(self, model: SentenceTransformer, text_format: TextFormat = _AS_KEPT, revision: str = "") -> None:
        names = [name for name, _ in model.named_children()]
        while len(names) > 1 and isinstance(model.get_submodule(names[-1]), Normalize):
            delattr(model, names.pop())
        self.model = model.float().eval().requires_grad_(False)
        self.text_format = text_format
        self.identity = text_teacher_identity(revision, text_format, model.max_seq_length)
        self.width = self._embed(_SAMPLE).shape[1]
        self._sources: dict[str, PreparedSource] = {}

    def use(self, sources: Sequence[PreparedSource]) -> None:
        """Set the sources of the batches; each has kept its texts."""
        self._sources = {source.name: source for source in sources}

    def embed(self, batch: dict[str, Any], width: int | None = None) -> Tensor:
        """``(n, width)`` unnormalised embeddings of the batch's distinct texts, on every process."""
        self.model.to(batch["input_ids"].device)
        own = self.embed_texts(self._sources[batch["source"]], np.asarray(batch["own_texts"]))
        return gather_texts(own[:, :width], batch)

    def embed_texts(self, source: PreparedSource, positions: np.ndarray) -> Tensor:
        """``(n, width)`` embeddings of the kept texts at ``(n,)`` positions of a source; see :meth:`encode`."""
        return self.encode(source.texts(positions))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """``(n, width)`` unnormalised fp32 embeddings of texts as the student reads them, on the model's device.

        Those with an instruction are put in the query template, the others in the document template.
        """
        if not len(texts):
            return torch.zeros(0, self.width, device=self.model.device)
        embeddings = self._embed([self.text_format.apply(text) for text in texts])
        finite = embeddings.isfinite().all(dim=1)
        if not finite.all():
            text = texts[int((~finite).nonzero()[0])]
            raise UserError(f"{KEY}: its embedding of {text[:50]!r} is not finite; choose another teacher")
        return embeddings

    def _embed(self, texts: Sequence[str]) -> Tensor:
        # The templates are the prompt: the model's default prompt is left out.
        found = self.model.encode(list(texts), prompt="", show_progress_bar=False, convert_to_tensor=True)
        # A tensor made in inference mode cannot be part of a loss that has a gradient; its copy can.
        return found.float().clone()


def text_teacher_identity(revision: str, text_format: TextFormat, max_length: int | None) -> str:
    """Return a digest of everything that a text teacher's embeddings depend on."""
    described = {"revision": revision, "format": asdict(text_format), "max_length": max_length}
    return blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()


def load_text_teacher(
    teacher: ModelRef | str, text_format: TextFormat = _AS_KEPT, *, device: str | None = None
) -> TextTeacher:
    """Load a teacher that reads texts, as it was resolved or by its name."""
    ref = resolve(teacher, KEY) if isinstance(teacher, str) else teacher
    model = load_encoder(ref, KEY, device=device, model_kwargs={"dtype": torch.float32})
    # A plain Qwen3 was once pooled by mean: embeddings from then must not be found.
    identity = f"{ref.identity} lasttoken" if reads_as_ours(ref) else ref.identity
    # A model that cannot pad or embed can raise anything.
    with user_error(f"{KEY}: {ref.name!r} cannot be used"):
        return TextTeacher(model, text_format, identity)
