"""Parameters and floating-point operations of a model of a given shape."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel

if TYPE_CHECKING:
    pass


def count_parameters(config: F2LLMConfig) -> int:
    """Parameters of a model of this shape, embeddings included."""
    with torch.device("meta"):
        return F2LLMModel(deepcopy(config)).num_parameters()


def forward_flops(config: F2LLMConfig, tokens: float, squared_tokens: float) -> float:
    """Operations of a forward pass.

    Args:
        config: The model's shape.
        tokens: Tokens of all texts.
        squared_tokens: Sum over the texts of their tokens, squared.
    """
    weights = count_parameters(config) - config.vocab_size * config.hidden_size
    width = config.num_attention_heads * config.head_dim
    return 2 * weights * tokens + 4 * config.num_hidden_layers * width * squared_tokens
