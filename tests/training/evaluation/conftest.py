"""The tiny model as sentence-transformers, without prompts."""

from __future__ import annotations

import pytest

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation.encoding import EmbeddingStore


@pytest.fixture
def encoder(tiny_model, tiny_tokenizer):
    return build_sentence_transformer(tiny_model, tiny_tokenizer, prompts={"query": "", "document": ""})


@pytest.fixture
def store(encoder):
    return EmbeddingStore(encoder)
