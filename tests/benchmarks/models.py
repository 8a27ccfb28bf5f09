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
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def configuration(settings: Settings, name: str | None = None, **overrides: int) -> F2LLMConfig:
    """Return a published shape, by default the one that the settings choose, with a small vocabulary."""
    special = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    tiny = _TINY if settings.quick else {}
    return F2LLMConfig.from_family(name or settings.family_name, **{**special, **tiny, **overrides})


def build_models(
    config: F2LLMConfig, dtype: torch.dtype = torch.float32, compile: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """``stock``, ``ours`` and, if asked for, ``ours_compiled``, all of the same weights.

    Returns:
        The models by name, and the reason why one is missing by name.
    """
    if compile:
        # Variants compiled for earlier comparisons would count towards torch's limit, beyond which it runs eagerly.
        torch.compiler.reset()
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"ours": _ours(config)}
    missing: dict[str, str] = {}
    # A config holds the attention implementation of its model: each model needs its own.
    models["stock"] = Qwen3Model._from_config(deepcopy(config), attn_implementation="sdpa")
    if compile:
        try:
            models["ours_compiled"] = _ours(config, compile=True)
        except TypeError as error:
            missing["ours_compiled"] = f"this F2LLMModel cannot be compiled: {error}"
    for name in models.keys() - {"ours"}:
        models[name].load_state_dict(models["ours"].state_dict())
    assert models["ours"].config._attn_implementation == "packed", models["ours"].config._attn_implementation
    order = [name for name in ("stock", "ours", "ours_compiled") if name in models]
    return {name: models[name].to(device(), dtype) for name in order}, missing


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


def _ours(config: F2LLMConfig, **keywords: bool) -> F2LLMModel:
    return F2LLMModel(deepcopy(config), **keywords)
