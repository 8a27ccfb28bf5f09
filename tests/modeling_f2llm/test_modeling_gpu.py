"""F2LLMModel on a GPU: its kernels equal the exact numbers; skipped where there is none."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.modeling_f2llm.comparing import assert_same, gradients_of, real


def on_cuda(model, batch, implementation):
    model = deepcopy(model)
    model.set_attn_implementation(implementation)
    return model.cuda(), {name: tensor.cuda() for name, tensor in batch.items()}


@pytest.mark.gpu
def test_cuda_chooses_a_kernel_that_equals_stock_in_fp32(tiny_model, stock_model, padded):
    model, inputs = on_cuda(tiny_model, padded, "packed")
    expected = real(stock_model(**padded).last_hidden_state, padded)
    assert_same(model(**inputs).last_hidden_state.cpu(), expected, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["packed", "torch_varlen"])
def test_cuda_bf16_kernel_equals_sdpa(tiny_model, random_batch, implementation):
    results = []
    for name in (implementation, "sdpa"):
        model, inputs = on_cuda(tiny_model.bfloat16(), random_batch([70, 3, 33, 3, 1]), name)
        hidden = model(**inputs).last_hidden_state
        hidden.float().square().sum().backward()
        results.append([hidden.float(), *(parameter.grad.float() for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs, tolerance=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["packed", "torch_varlen", "sdpa"])
def test_cuda_autocast_is_close_to_fp32(tiny_model, random_batch, implementation):
    batch = random_batch([70, 3, 33, 3, 1])
    expected = gradients_of(tiny_model, **batch)
    exact = tiny_model(**batch).last_hidden_state
    model, inputs = on_cuda(tiny_model, batch, implementation)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        hidden = model(**inputs).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).cuda()
        loss = (real(hidden, inputs) * weights).sum()
    assert_same(hidden.float().cpu(), exact, tolerance=0.03)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad.cpu(), expected[name], tolerance=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["packed", "torch_varlen"])
def test_cuda_sliding_windows_equal_sdpa(tiny_model, tiny_config, random_batch, implementation):
    fields = {**tiny_config.to_dict(), "layer_types": None, "max_window_layers": 1}
    config = F2LLMConfig(**fields | {"use_sliding_window": True, "sliding_window": 5})
    sliding = F2LLMModel(config).eval().bfloat16()
    sliding.load_state_dict(tiny_model.state_dict())
    batch = random_batch([70, 3, 33])
    outputs = []
    for name in (implementation, "sdpa"):
        model, inputs = on_cuda(sliding, batch, name)
        outputs.append(model(**inputs).last_hidden_state.float())
    assert_same(*outputs, tolerance=0.03)
