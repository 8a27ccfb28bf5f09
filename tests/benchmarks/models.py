"""The models that are measured: ours and stock Qwen3, with the same weights."""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel

__all__ = ["VOCAB_SIZE", "build_models", "device"]

# The published vocabulary would make the table of embeddings, which both models share, most of the memory.
VOCAB_SIZE = 8192


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_models(dtype: torch.dtype = torch.float32, compile: bool = False) -> tuple[F2LLMModel, Qwen3Model]:
    """80M-shaped models with a small vocabulary."""
    torch.manual_seed(0)
    config = F2LLMConfig.from_family(
        "f2llm-v2-80m", vocab_size=VOCAB_SIZE, pad_token_id=0, bos_token_id=0, eos_token_id=1
    )
    ours = F2LLMModel(config, compile=compile).to(device(), dtype)
    # A config holds the attention implementation of its model: each model needs its own.
    stock = Qwen3Model._from_config(deepcopy(config), attn_implementation="sdpa").to(device(), dtype)
    stock.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation == "packed", ours.config._attn_implementation
    return ours, stock
