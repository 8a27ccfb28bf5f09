"""Models to cut."""

from __future__ import annotations

import torch

from modeling_f2llm import F2LLMConfig, F2LLMModel

SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}


def make_model(**fields):
    """Random weights, those of norms and biases included, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = F2LLMModel(F2LLMConfig(**{**SHAPE, **fields})).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.data.uniform_(0.2, 2.0)
            elif "bias" in name:
                weight.data.normal_()
            else:
                weight.data.mul_(5)
    return model
