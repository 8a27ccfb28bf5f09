"""Loading weights, all of them or none."""

from __future__ import annotations

from typing import Any

import torch

from modeling_f2llm.modeling_f2llm import F2LLMModel

__all__ = ["load_whole_model"]


def load_whole_model(name: str, **options: Any) -> F2LLMModel:
    """Loads a model in fp32: AdamW at usual learning rates is lost on bf16 weights.

    Args:
        name: Folder or Hub name.
        **options: Those of ``F2LLMModel.from_pretrained``.

    Raises:
        ValueError: If weights are missing, which the library would fill with random ones.
        Exception: Whatever the libraries make of a damaged folder.
    """
    model, loaded = F2LLMModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    if loaded["missing_keys"]:
        raise ValueError(f"its weights lack {sorted(loaded['missing_keys'])[0]} and others")
    return model
