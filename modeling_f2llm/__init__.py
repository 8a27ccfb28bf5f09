"""F2LLM: multilingual text-embedding models on the Qwen3 architecture."""

from __future__ import annotations

from .configuration_f2llm import FAMILY, F2LLMConfig, matryoshka_dims
from .losses import distillation_loss, hard_negative_loss, in_batch_loss, matryoshka_weights
from .modeling_f2llm import F2LLMModel
from .prompts import DEFAULT_PROMPTS, TASK_INSTRUCTIONS, instruct
from .sentence_transformer import build_sentence_transformer
from .tokenizer import append_eos

__all__ = [
    "DEFAULT_PROMPTS",
    "FAMILY",
    "TASK_INSTRUCTIONS",
    "F2LLMConfig",
    "F2LLMModel",
    "append_eos",
    "build_sentence_transformer",
    "distillation_loss",
    "hard_negative_loss",
    "in_batch_loss",
    "instruct",
    "matryoshka_dims",
    "matryoshka_weights",
]
