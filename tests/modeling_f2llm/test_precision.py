"""Training, autocast and low precision: gradients and numbers beside those of stock Qwen3Model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Model

from modeling_f2llm import F2LLMModel
from tests.modeling_f2llm.comparing import LENGTHS, Batch, assert_same, gradients_of, real


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: F2LLMModel, random_batch: Callable[..., Batch], use_reentrant: bool, form: str
):
    inputs = random_batch(LENGTHS)
    if form == "packed":
        mask = inputs["attention_mask"].bool()
        inputs = {"input_ids": inputs["input_ids"][mask][None], "sequence_lengths": LENGTHS}

    def gradients() -> list[Tensor]:
        tiny_model.zero_grad()
        tiny_model(**inputs).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in tiny_model.parameters()]

    tiny_model.train()
    expected = gradients()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    runs = []
    tiny_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert_same(ours, theirs)
    assert len(runs) == 2  # forward, and again in backward


def test_autocast_is_as_close_to_fp32_as_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, padded: Batch):
    exact = tiny_model(**padded).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = tiny_model(**padded).last_hidden_state
        stock = real(stock_model(**padded).last_hidden_state, padded)
    assert_same(actual, exact, tolerance=0.02)
    assert (actual - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()


def test_autocast_gradients_are_close_to_fp32(tiny_model: F2LLMModel, padded: Batch):
    expected = gradients_of(tiny_model, **padded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients_of(tiny_model, **padded)
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert_same(actual[name], expected[name], tolerance=0.05)


def test_bf16_weights_are_as_close_to_fp32_as_stock(tiny_model: F2LLMModel, stock_model: Qwen3Model, padded: Batch):
    exact = deepcopy(tiny_model)(**padded).last_hidden_state
    actual = tiny_model.bfloat16()(**padded).last_hidden_state
    stock = real(stock_model.bfloat16()(**padded).last_hidden_state, padded)
    assert actual.dtype == torch.bfloat16
    assert_same(actual.float(), exact, tolerance=0.02)
    assert (actual - exact).abs().mean() < 1.5 * (stock - exact).abs().mean()
