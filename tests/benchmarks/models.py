"""The models that are measured: ours and stock Qwen3, with the same weights."""

from __future__ import annotations

from copy import deepcopy

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.benchmarks.machine import Settings, device

# The published vocabulary would make the table of embeddings, which all models share, most of the memory.
VOCAB_SIZE = 8192
_TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}


def configuration(settings: Settings, name: str | None = None, **overrides: int) -> F2LLMConfig:
    """Return a published shape, by default the one that the settings choose, with a small vocabulary."""
    special = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    tiny = _TINY if settings.quick else {}
    return F2LLMConfig.from_family(name or settings.family_name, **{**special, **tiny, **overrides})


def build_models(
    config: F2LLMConfig, dtype: torch.dtype = torch.float32, compile: bool = False
) -> dict[str, nn.Module]:
    """``stock``, ``ours`` and, if asked for, ``ours_compiled``, all of the same weights."""
    if compile:
        # Variants compiled for earlier comparisons would count towards torch's limit, beyond which it runs eagerly.
        torch.compiler.reset()
    torch.manual_seed(0)
    ours = F2LLMModel(deepcopy(config))
    assert ours.config._attn_implementation == "packed", ours.config._attn_implementation
    # A config holds the attention implementation of its model: each model needs its own.
    models = {"stock": Qwen3Model._from_config(deepcopy(config), attn_implementation="sdpa"), "ours": ours}
    if compile:
        models["ours_compiled"] = F2LLMModel(deepcopy(config), compile=True)
    for model in models.values():
        model.load_state_dict(ours.state_dict())
    return {name: model.to(device(), dtype) for name, model in models.items()}


def random_model(config: F2LLMConfig) -> F2LLMModel:
    """Weights drawn in place: transformers' own initialisation of so large a model takes longer than cutting it."""
    with init_empty_weights(include_buffers=False):
        model = F2LLMModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(weight.shape)
        if weight.ndim == 1
        else torch.empty(weight.shape).uniform_(-0.03, 0.03, generator=generator)
        for name, weight in model.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    return model
