"""Every way to ask for an attention implementation, and what it says where one is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.modeling_f2llm.comparing import Batch, assert_same, real

# What was asked for -> what the config says.
AVAILABLE = {None: "packed", "packed": "packed", "sdpa": "packed_sdpa", "packed_sdpa": "packed_sdpa", "eager": "eager"}


@pytest.mark.parametrize("asked", AVAILABLE)
def test_every_available_implementation_equals_stock(
    saved_folder: Path, stock_model: Qwen3Model, padded: Batch, asked: str | None
):
    arguments = {} if asked is None else {"attn_implementation": asked}
    model = F2LLMModel.from_pretrained(saved_folder, **arguments)
    assert model.config._attn_implementation == AVAILABLE[asked]
    assert_same(model(**padded).last_hidden_state, real(stock_model(**padded).last_hidden_state, padded))


@pytest.mark.parametrize("asked", [name for name in AVAILABLE if name])
def test_implementation_can_be_set_after_loading(tiny_model: F2LLMModel, padded: Batch, asked: str):
    expected = tiny_model(**padded).last_hidden_state
    tiny_model.set_attn_implementation(asked)
    assert tiny_model.config._attn_implementation == AVAILABLE[asked]
    assert_same(tiny_model(**padded).last_hidden_state, expected)


@pytest.mark.parametrize("asked", [name for name in AVAILABLE if name])
def test_implementation_can_be_named_in_the_config(tiny_config: F2LLMConfig, asked: str):
    fields = {**tiny_config.to_dict(), "attn_implementation": asked}
    assert F2LLMModel(F2LLMConfig(**fields)).config._attn_implementation == AVAILABLE[asked]


def asking_for(implementation: str, model: F2LLMModel, folder: Path) -> list[Callable[[], object]]:
    """The ways to ask for an implementation."""
    return [
        lambda: F2LLMModel.from_pretrained(folder, attn_implementation=implementation),
        lambda: model.set_attn_implementation(implementation),
        lambda: F2LLMModel(F2LLMConfig(**{**model.config.to_dict(), "attn_implementation": implementation})),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA runs torch's variable-length kernel")
def test_torch_varlen_without_cuda_says_what_to_install(tiny_model: F2LLMModel, saved_folder: Path):
    for ask in asking_for("torch_varlen", tiny_model, saved_folder):
        with pytest.raises(ImportError, match=r"torch_varlen.*torch >= 2\.10.*install a CUDA build of torch"):
            ask()


def test_flash_attention_without_its_package_says_what_to_install(tiny_model: F2LLMModel, saved_folder: Path):
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        for ask in asking_for("flash_attention_2", tiny_model, saved_folder):
            with pytest.raises(ImportError, match=r"flash_attention_2.*pip install \"f2llm\[flash\]\""):
                ask()
    else:
        pytest.skip("flash-attn is installed")


def test_unknown_implementations_are_refused_and_the_own_ones_named(tiny_model: F2LLMModel, saved_folder: Path):
    for ask in asking_for("nonsense", tiny_model, saved_folder):
        with pytest.raises(ValueError, match=r"nonsense.*'packed' \(the default\) and 'torch_varlen'"):
            ask()
