"""The model that embeds texts for mining: any SentenceTransformer, pinned to what it is now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from modeling_f2llm.prompts import instruct
from training.common.errors import UserError
from training.data.instructions import split_instruction, without_instruction
from training.models.encoders import TRUST_OPTION, load_encoder
from training.models.reference import ModelRef, resolve
from training.models.settings import reads_as_ours

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Miner:
    """How texts are embedded.

    Attributes:
        model: Folder or Hub name.
        revision: The commit on the Hub, or a digest of the folder's files.
        max_length: Tokens of a text at most; the model's own limit if None.
        truncate_dim: Leading dimensions used; all if None.
        dtype: Of the weights.
        batch_size: Texts at once.
        trust_remote_code: Run code that comes with the model.
    """

    model: str
    revision: str
    max_length: int | None = None
    truncate_dim: int | None = None
    dtype: str = "float32"
    batch_size: int = 32
    trust_remote_code: bool = False

    def made_by(self) -> dict[str, Any]:
        """What embeddings depend on, for the key of their cache."""
        described = asdict(self)
        # A folder may move: its files are its revision. The batch changes nothing but the last bits.
        described.pop("batch_size")
        if Path(self.model).is_dir():
            described.pop("model")
        # Was pooled by mean once: those embeddings are not to be found.
        if reads_as_ours(self.model, self._commit):
            described["pooling"] = "lasttoken"
        return described

    @property
    def _commit(self) -> str | None:
        return None if Path(self.model).is_dir() else self.revision

    def embed_queries(self, texts: Sequence[str], instruction: str | None) -> NDArray[np.float32]:
        """Embeds queries, under an instruction or else under the model's own prompt, if it has one.

        Returns:
            ``(len(texts), dimensions)`` of unit length.
        """
        model = _load(self)
        if instruction is None:
            # Its own prompt takes the place of what published files carry in the text.
            return _unit(model.encode_query([without_instruction(text) for text in texts], **self._options()))
        # Published files may carry the instruction in the text already.
        carried = np.array([split_instruction(text)[0] is not None for text in texts], dtype=bool)
        vectors: NDArray[np.float32] | None = None
        for rows, prompt in ((np.flatnonzero(~carried), instruct(instruction)), (np.flatnonzero(carried), "")):
            if len(rows):
                part = _unit(model.encode_query([texts[row] for row in rows], prompt=prompt, **self._options()))
                vectors = np.empty((len(texts), part.shape[1]), dtype=np.float32) if vectors is None else vectors
                vectors[rows] = part
        assert vectors is not None
        return vectors

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeds passages under the model's own document prompt, if it has one; see :meth:`embed_queries`."""
        return _unit(_load(self).encode_document(list(texts), **self._options()))

    def _options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "show_progress_bar": False}


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Normalised in fp32, whatever the model computes in."""
    vectors = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise UserError("the miner gives embeddings that are not finite; use dtype float32 or another model")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def find_miner(model: str, **options: Any) -> Miner:
    """Finds a model and pins its revision, without loading it.

    Args:
        model: Folder, run or Hub name.
        **options: The other fields of :class:`Miner`.

    Raises:
        UserError: If there is no such model or an option is out of range.
    """
    found = resolve(model, "--model")
    miner = Miner(found.place, found.identity, **options)
    for name in ("max_length", "truncate_dim", "batch_size"):
        value = getattr(miner, name)
        if value is not None and value < 1:
            raise UserError(f"{name.replace('_', '-')} must be at least 1, got {value}")
    if miner.dtype not in _DTYPES:
        raise UserError(f"unknown dtype {miner.dtype!r}; use one of {', '.join(_DTYPES)}")
    return miner


# A worker embeds for many tasks: it loads the model for the first.
@lru_cache(maxsize=1)
def _load(miner: Miner) -> SentenceTransformer:
    found = ModelRef(miner.model, miner.model, miner._commit, miner.revision)
    model = load_encoder(
        found,
        "--model",
        trust_remote_code=miner.trust_remote_code,
        trust=TRUST_OPTION,
        truncate_dim=miner.truncate_dim,
        model_kwargs={"dtype": getattr(torch, miner.dtype)},
    )
    if miner.max_length is not None:
        if model.max_seq_length is not None and miner.max_length > model.max_seq_length:
            raise UserError(
                f"--max-length {miner.max_length} is more than the {model.max_seq_length} tokens of a text that "
                f"{miner.model} reads; give --max-length {model.max_seq_length}, or leave it out"
            )
        model.max_seq_length = miner.max_length
    return model
