"""SentenceTransformer.encode over 256 documents in batches of 32, at log-normal and at equal lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from modeling_f2llm import build_sentence_transformer
from tests.benchmarks.models import VOCAB_SIZE, build_models

__all__ = ["cases"]

DOCUMENTS, BATCH, MEDIAN, CAP = 256, 32, 90, 480


def _tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: documents have just the lengths that are asked for."""
    words = {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _documents(lengths: np.ndarray) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in generator.integers(2, VOCAB_SIZE, length - 1)) for length in lengths]


def cases(dtype: torch.dtype, compile: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """Encoding with either model; weights in the precision measured."""
    generator = np.random.default_rng(1)
    documents = {
        "log_normal": _documents(generator.lognormal(np.log(MEDIAN), 0.7, DOCUMENTS).clip(4, CAP).astype(int)),
        "equal": _documents(np.full(DOCUMENTS, MEDIAN)),
    }
    models = {
        name: build_sentence_transformer(model.eval(), _tokenizer())
        for name, model in zip(("ours", "stock"), build_models(dtype, compile), strict=True)
    }

    def encoder(model: SentenceTransformer, texts: list[str]) -> Callable[[], Any]:
        return lambda: model.encode(texts, batch_size=BATCH, show_progress_bar=False)

    return {name: {who: encoder(model, texts) for who, model in models.items()} for name, texts in documents.items()}
