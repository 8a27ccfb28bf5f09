"""Load any CrossEncoder to score pairs of query and passage: checked, its own code run only on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder

from training.common.errors import UserError, in_one_line
from training.data.instructions import without_instruction
from training.models.loading import check_finite, check_tokenizer
from training.models.model_ref import resolve


@dataclass(frozen=True)
class Reranker:
    """The model that scores pairs for mining, pinned to a commit on the Hub or a digest of its folder's files."""

    model: str
    revision: str
    dtype: str = "float32"
    batch_size: int = 32
    trust_remote_code: bool = False

    def made_by(self) -> dict[str, Any]:
        """Return what scores depend on."""
        described = asdict(self)
        # As for a miner: neither the batch size nor the place of a folder changes more than the last bits.
        described.pop("batch_size")
        if Path(self.model).is_dir():
            described.pop("model")
        return described

    def scores(self, queries: Sequence[str], passages: Sequence[str]) -> NDArray[np.float32]:
        """``(n,)`` scores of pairs, higher for passages that answer better; queries are read without instruction."""
        pairs = [(without_instruction(query), passage) for query, passage in zip(queries, passages, strict=True)]
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        scores = _load_reranker(self).predict(pairs, batch_size=self.batch_size, show_progress_bar=False)
        scores = np.asarray(scores, dtype=np.float32)
        if not np.isfinite(scores).all():
            raise UserError(f"the reranker {self.model} gives scores that are not finite; use dtype float32 or another")
        return scores


def find_reranker(model: str, key: str = "--reranker", **options: Any) -> Reranker:
    """Find a model and pin its revision, without loading it; ``key`` is what the user gave it as."""
    found = resolve(model, key)
    return Reranker(found.place, found.identity, **options)


# As for a miner: a worker loads the model for the first of its tasks.
@lru_cache(maxsize=1)
def _load_reranker(reranker: Reranker) -> CrossEncoder:
    try:
        model = CrossEncoder(
            reranker.model,
            revision=None if Path(reranker.model).is_dir() else reranker.revision,
            trust_remote_code=reranker.trust_remote_code,
            model_kwargs={"dtype": getattr(torch, reranker.dtype)},
        )
        check_tokenizer(model.tokenizer)
        check_finite(model)
        # transformers marks the weights that it has read; an encoder without a head would get a random one.
        inner = {} if model.model is None else dict(model.model.named_parameters())
        if missing := [name for name, weight in inner.items() if not getattr(weight, "_is_hf_initialized", False)]:
            raise ValueError(f"its weights lack {missing[0]}: it is no cross-encoder")
        if model.num_labels != 1:
            raise ValueError(f"it gives {model.num_labels} scores for a pair, not one")
    # from_pretrained can raise any exception on a corrupt folder.
    except Exception as error:
        reason = in_one_line(error)
        if "trust_remote_code" in reason:
            reason = "it needs code that comes with it, which does not run by default; use a reranker that needs none"
        raise UserError(f"reranker {reranker.model!r} cannot be used: {reason}; name a CrossEncoder") from None
    return model


def forget_reranker() -> None:
    """Free the memory of the reranker that this process has loaded."""
    _load_reranker.cache_clear()
