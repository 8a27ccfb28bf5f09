"""Models on disk that the tests of this room share."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from modeling_f2llm import F2LLMModel, build_sentence_transformer
from tests.training.distributed_recipe import save_model


@pytest.fixture
def whole(tmp_path, tiny_config, tiny_tokenizer):
    """A released folder."""
    save_model(tmp_path / "whole", tiny_config, tiny_tokenizer)
    return tmp_path / "whole"


@pytest.fixture
def folder(tmp_path, tiny_config, small_tokenizer):
    """A model as training leaves it, with merges, more rows than tokens, and another rotary base than the usual."""
    config, tokenizer = deepcopy(tiny_config), deepcopy(small_tokenizer)
    config.vocab_size, config.rope_parameters = 416, {"rope_type": "default", "rope_theta": 100.0}
    tokenizer.model_max_length = 256
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = F2LLMModel(config).eval()
        for name, weights in model.named_parameters():
            # Larger than at the start of training, so that positions matter.
            weights.data.normal_(1 if name.endswith("norm.weight") else 0, 0.1)
    build_sentence_transformer(model, tokenizer).save_pretrained(str(tmp_path / "model"), create_model_card=False)
    return tmp_path / "model"
