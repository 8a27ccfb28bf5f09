"""Every way to ask for an attention implementation, and what it says where one is missing."""

from __future__ import annotations

import pytest
import torch

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.modeling_f2llm.comparing import assert_same, real

# What was asked for -> what the config says.
AVAILABLE = {None: "packed", "packed": "packed", "sdpa": "packed_sdpa", "packed_sdpa": "packed_sdpa", "eager": "eager"}


@pytest.mark.parametrize("asked", AVAILABLE)
def test_every_available_implementation_equals_stock(saved_folder, stock_model, tiny_model, padded, asked):
    arguments = {} if asked is None else {"attn_implementation": asked}
    models = [F2LLMModel.from_pretrained(saved_folder, **arguments)]
    if asked is not None:
        tiny_model.set_attn_implementation(asked)
        named = F2LLMModel(F2LLMConfig(**{**tiny_model.config.to_dict(), **arguments})).eval()
        named.load_state_dict(tiny_model.state_dict())
        models += [tiny_model, named]
    expected = real(stock_model(**padded).last_hidden_state, padded)
    for model in models:
        assert model.config._attn_implementation == AVAILABLE[asked]
        assert_same(model(**padded).last_hidden_state, expected)


def asking_for(implementation, model, folder):
    """The ways to ask for an implementation."""
    return [
        lambda: F2LLMModel.from_pretrained(folder, attn_implementation=implementation),
        lambda: model.set_attn_implementation(implementation),
        lambda: F2LLMModel(F2LLMConfig(**{**model.config.to_dict(), "attn_implementation": implementation})),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA runs torch's variable-length kernel")
def test_torch_varlen_without_cuda_says_what_to_install(tiny_model, saved_folder):
    for ask in asking_for("torch_varlen", tiny_model, saved_folder):
        with pytest.raises(ImportError, match=r"torch_varlen.*torch >= 2\.10.*install a CUDA build of torch"):
            ask()


def test_flash_attention_without_its_package_says_what_to_install(tiny_model, saved_folder):
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        for ask in asking_for("flash_attention_2", tiny_model, saved_folder):
            with pytest.raises(ImportError, match=r"flash_attention_2.*pip install \"f2llm\[flash\]\""):
                ask()
    else:
        pytest.skip("flash-attn is installed")


def test_unknown_implementations_are_refused_and_the_own_ones_named(tiny_model, saved_folder):
    for ask in asking_for("nonsense", tiny_model, saved_folder):
        with pytest.raises(ValueError, match=r"nonsense.*'packed' \(the default\) and 'torch_varlen'"):
            ask()
