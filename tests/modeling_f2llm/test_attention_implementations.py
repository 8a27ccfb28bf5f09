"""Every way to ask for an attention implementation, and what it says where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

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


@pytest.mark.parametrize(
    ("implementation", "error", "message"),
    [
        ("torch_varlen", ImportError, r"torch_varlen.*torch >= 2\.10.*install a CUDA build of torch"),
        ("flash_attention_2", ImportError, r"flash_attention_2.*pip install \"f2llm\[flash\]\""),
        ("nonsense", ValueError, r"nonsense.*'packed' \(the default\) and 'torch_varlen'"),
    ],
)
def test_a_missing_implementation_is_refused_with_what_to_do(tiny_model, saved_folder, implementation, error, message):
    if implementation == "torch_varlen" and torch.cuda.is_available():
        pytest.skip("CUDA runs torch's variable-length kernel")
    if implementation == "flash_attention_2" and find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    fields = {**tiny_model.config.to_dict(), "attn_implementation": implementation}
    for ask in (
        lambda: F2LLMModel.from_pretrained(saved_folder, attn_implementation=implementation),
        lambda: tiny_model.set_attn_implementation(implementation),
        lambda: F2LLMModel(F2LLMConfig(**fields)),
    ):
        with pytest.raises(error, match=message):
            ask()
