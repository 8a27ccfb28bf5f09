"""Models on disk that the tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from modeling_f2llm import build_sentence_transformer
from tests.training.distributed_recipe import save_model


@pytest.fixture
def whole(tmp_path, tiny_config, tiny_tokenizer) -> Path:
    """A released folder."""
    save_model(tmp_path / "whole", tiny_config, tiny_tokenizer)
    return tmp_path / "whole"


@pytest.fixture
def folder(tmp_path, tiny_model, small_tokenizer) -> Path:
    """A model whose tokenizer has merges, and whose vocabulary is larger than the tokenizer's."""
    tiny_model.resize_token_embeddings(416)
    for name, weights in tiny_model.named_parameters():
        if name.endswith("norm.weight"):
            weights.data.normal_(1, 0.1)
    build_sentence_transformer(tiny_model, small_tokenizer).save_pretrained(
        str(tmp_path / "model"), create_model_card=False
    )
    return tmp_path / "model"
