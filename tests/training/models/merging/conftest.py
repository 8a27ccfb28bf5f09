"""Small models to merge: the same architecture and tokenizer, other weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMConfig, F2LLMModel, build_sentence_transformer

SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path, tiny_config: F2LLMConfig, tiny_tokenizer: PreTrainedTokenizerBase) -> SaveModel:
    """``save_model(name, seed=0, dtype=torch.float32, prompts=None, tokenizer=None, **config)``: a model's folder."""

    def save(name, seed=0, dtype=torch.float32, prompts=None, tokenizer=None, **config) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed = {**tiny_config.to_dict(), "matryoshka_dimensions": None, "layer_types": None, **config}
            model = F2LLMModel(F2LLMConfig(**changed)).to(dtype)
        built = build_sentence_transformer(model, deepcopy(tokenizer or tiny_tokenizer), prompts)
        built.save_pretrained(str(tmp_path / name), create_model_card=False)
        return tmp_path / name

    return save
