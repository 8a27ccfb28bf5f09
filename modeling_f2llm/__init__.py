"""F2LLM: multilingual text-embedding models on the Qwen3 architecture."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_f2llm import FAMILY, F2LLMConfig, matryoshka_dims
    from .losses import (
        cosent_loss,
        distillation_loss,
        false_negatives,
        hard_negative_loss,
        in_batch_loss,
        matryoshka_weights,
        score_distillation_loss,
    )
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
    "cosent_loss",
    "distillation_loss",
    "false_negatives",
    "hard_negative_loss",
    "in_batch_loss",
    "instruct",
    "matryoshka_dims",
    "matryoshka_weights",
    "score_distillation_loss",
]

# Where each name comes from. Imported when asked for: a process that only writes prompts or prepares data needs none of
# the 400 MB that torch and transformers take.
_HOMES = {
    "configuration_f2llm": ("FAMILY", "F2LLMConfig", "matryoshka_dims"),
    "losses": (
        *("cosent_loss", "distillation_loss", "false_negatives", "hard_negative_loss", "in_batch_loss"),
        *("matryoshka_weights", "score_distillation_loss"),
    ),
    "modeling_f2llm": ("F2LLMModel",),
    "prompts": ("DEFAULT_PROMPTS", "TASK_INSTRUCTIONS", "instruct"),
    "sentence_transformer": ("build_sentence_transformer",),
    "tokenizer": ("append_eos",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
