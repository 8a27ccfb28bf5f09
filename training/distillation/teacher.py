"""A teacher that reads the student's own tokens: embeds the texts of each batch as the student meets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_f2llm.tokenizer import append_eos
from training.common.errors import UserError, in_one_line
from training.data.prepared import PreparedSource
from training.models.encoding import embed_batch, embed_chunk
from training.models.loading import load_whole_model
from training.models.packed_texts import packed_texts
from training.models.settings import is_plain, model_type, why_not_last_token

_TOKENS_AT_ONCE = 16_384
# Texts that differ in script, length and merges, to tell tokenizers apart.
_PROBES = ("", "a", "Where do giant pandas live?\nQuery: 大熊猫", " größer  שלום 12345 🙂")


class Teacher:
    """A frozen model over the student's own tokens.

    Args:
        model: The teacher; it must know the student's tokens.
        max_tokens: Tokens of a forward pass over texts of a source, at most.

    Attributes:
        width: Its dimensions ``D``.
    """

    def __init__(self, model: PreTrainedModel, max_tokens: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.width: int = model.config.hidden_size
        self._max_tokens = max_tokens or _TOKENS_AT_ONCE

    def to(self, device: torch.device) -> None:
        """Moves the model to a device."""
        self.model.to(device)

    def embed(self, batch: dict[str, Any], width: int | None = None) -> Tensor:
        """``(n, width)`` unnormalised embeddings of the batch's distinct texts, on every process.

        Args:
            batch: This process's part of the batch.
            width: Leading dimensions wanted; all ``D`` if None.
        """
        self.to(batch["input_ids"].device)
        return embed_batch(self.model, batch, width)

    @torch.no_grad()
    def embed_texts(self, source: PreparedSource, positions: np.ndarray) -> Tensor:
        """``(n, D)`` unnormalised embeddings, on the CPU, of the texts at ``(n,)`` ascending positions of a source."""
        embeddings = torch.empty(len(positions), self.width)
        for texts in packed_texts(source, positions, self._max_tokens):
            found = embed_chunk(self.model, texts.input_ids.to(self.model.device), texts.lengths)
            embeddings[np.searchsorted(positions, texts.positions)] = found.float().cpu()
        return embeddings


def reads_tokens_of(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a teacher can be given the student's token ids and read at its last token, as it is meant to be.

    So it can if it is a Qwen3 model of last-token pooling and nothing after it but normalisation, and its tokenizer
    turns texts into the very ids of the student's, their end included. Every other teacher is to be given texts.

    Args:
        name: Folder or Hub name.
        tokenizer: The student's tokenizer.
    """
    try:
        if model_type(name) != "qwen3" or why_not_last_token(name) is not None:
            return False
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if is_plain(name):
            # A plain model says nothing of how texts end.
            append_eos(theirs)
    # Damaged folders come out of the libraries as anything; loading the model says what is wrong.
    except Exception:
        return False
    same = theirs.get_vocab() == tokenizer.get_vocab()
    return same and all(theirs(text).input_ids == tokenizer(text).input_ids for text in _PROBES)


def load_teacher(name: str, **model_options: Any) -> PreTrainedModel:
    """Loads a teacher that :func:`reads_tokens_of` the student.

    Args:
        name: Folder or Hub name.
        **model_options: Those of ``F2LLMModel.from_pretrained``.

    Raises:
        UserError: If it cannot be loaded.
    """
    try:
        return load_whole_model(name, **model_options)
    # Damaged folders come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"key 'teacher': {name!r} cannot be used: {in_one_line(error)}") from None
