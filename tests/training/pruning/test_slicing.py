"""Every kept weight stands where it belongs, and what does nothing can be taken away without a trace."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.training.pruning.models import make_model
from training.pruning.plan import PruningPlan, make_plan
from training.pruning.shape import PRUNED_FIELDS, pruned_config
from training.pruning.slicing import slice_model

HIDDEN = (0, 20, 31, 3, 9, 5, 6, 7)
LAYERS = (0, 2)
NEURONS = ((1, 4, 7, 40), (0, 2, 3, 47))


def _plan(model, hidden=HIDDEN, layers=LAYERS, neurons=NEURONS) -> PruningPlan:
    return PruningPlan(hidden, layers, neurons, {name: getattr(model.config, name) for name in PRUNED_FIELDS}, {})


def _sliced(model, **parts):
    plan = _plan(model, **parts)
    shape = {
        "hidden_size": len(plan.hidden),
        "intermediate_size": len(plan.neurons[0]),
        "num_hidden_layers": len(plan.layers),
    }
    return slice_model(model, pruned_config(model.config, shape), plan)


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}])
def test_every_weight_is_where_the_plan_says(fields):
    model = make_model(**fields)
    whole, cut = model.state_dict(), dict(_sliced(model).named_parameters())
    hidden = torch.tensor(HIDDEN)
    seen = {"embed_tokens.weight", "norm.weight"}
    assert torch.equal(cut["embed_tokens.weight"], whole["embed_tokens.weight"][:, hidden])
    assert torch.equal(cut["norm.weight"], whole["norm.weight"][hidden])
    for new, (old, neurons) in enumerate(zip(LAYERS, map(torch.tensor, NEURONS), strict=True)):
        for part in ("q", "k", "v", "o"):
            weight = whole[f"layers.{old}.self_attn.{part}_proj.weight"]
            expected = weight[hidden] if part == "o" else weight[:, hidden]
            name = f"layers.{new}.self_attn.{part}_proj.weight"
            assert torch.equal(cut[name], expected), name
            seen.add(name)
            if fields:
                bias = whole[f"layers.{old}.self_attn.{part}_proj.bias"]
                name = f"layers.{new}.self_attn.{part}_proj.bias"
                assert torch.equal(cut[name], bias[hidden] if part == "o" else bias), name
                seen.add(name)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            weight = whole[f"layers.{old}.{name}.weight"]
            assert torch.equal(cut[f"layers.{new}.{name}.weight"], weight[hidden] if "layernorm" in name else weight)
            seen.add(f"layers.{new}.{name}.weight")
        for part in ("gate", "up", "down"):
            weight = whole[f"layers.{old}.mlp.{part}_proj.weight"]
            expected = weight[hidden][:, neurons] if part == "down" else weight[neurons][:, hidden]
            assert torch.equal(cut[f"layers.{new}.mlp.{part}_proj.weight"], expected), part
            seen.add(f"layers.{new}.mlp.{part}_proj.weight")
    assert cut.keys() == seen


def test_pruning_by_nothing_is_the_identity(model, importance, embed_packed):
    plan = make_plan(model.config, model.config, importance)
    same = slice_model(model, model.config, plan)
    # A model that was made, not loaded, has none in its configuration.
    assert same.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}
    state = model.state_dict()
    assert same.state_dict().keys() == state.keys()
    for name, weight in same.state_dict().items():
        assert torch.equal(weight, state[name]), name
        assert weight.data_ptr() != state[name].data_ptr(), name
    assert torch.equal(embed_packed(same), embed_packed(model))


def test_neurons_without_effect_leave_the_output_as_it_was(model, embed_packed):
    kept = ((1, 4, 7, 40), (0, 2, 3, 47), (5, 6, 46, 45))
    for layer, neurons in zip(model.layers, kept, strict=True):
        dropped = [neuron for neuron in range(48) if neuron not in neurons]
        layer.mlp.down_proj.weight.data[:, dropped] = 0
    cut = _sliced(model, hidden=tuple(range(32)), layers=(0, 1, 2), neurons=kept)
    torch.testing.assert_close(embed_packed(cut), embed_packed(model), rtol=1e-5, atol=1e-5)


def test_a_layer_without_effect_leaves_the_output_as_it_was(model, embed_packed):
    model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.layers[1].mlp.down_proj.weight.data.zero_()
    cut = _sliced(model, hidden=tuple(range(32)), neurons=(tuple(range(48)),) * 2)
    assert torch.equal(embed_packed(cut), embed_packed(model))


def test_channels_that_carry_zeros_leave_the_others_as_they_were(model, embed_packed):
    dropped = [channel for channel in range(32) if channel not in HIDDEN]
    model.embed_tokens.weight.data[:, dropped] = 0
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data[dropped] = 0
        layer.mlp.down_proj.weight.data[dropped] = 0
    cut = _sliced(model, layers=(0, 1, 2), neurons=(tuple(range(48)),) * 3)
    # The mean square over 32 channels, 24 of them zeros, is a quarter of that over the 8 others: a norm over the 8
    # alone, with epsilon in the same proportion, puts out half as much. The norms of heads are as they were.
    for name, module in cut.named_modules():
        if name == "norm" or name.endswith("layernorm"):
            module.weight.data *= (32 / 8) ** 0.5
            module.variance_epsilon *= 32 / 8
    torch.testing.assert_close(embed_packed(cut), embed_packed(model)[:, list(HIDDEN)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_mode_and_gradients_are_kept(model, dtype):
    cut = _sliced(model.to(dtype).train())
    assert {weight.dtype for weight in cut.parameters()} == {dtype} and cut.config.dtype == dtype
    assert all(weight.requires_grad and weight.is_leaf for weight in cut.parameters())
    assert cut.training and not _sliced(model.eval()).training
    assert cut.rotary_emb.inv_freq.dtype == torch.float32


def test_padding_keeps_its_row(model):
    cut = _sliced(model)
    assert cut.config.pad_token_id == model.config.pad_token_id == 0
    assert cut.embed_tokens.padding_idx is None  # it may end texts, and then be learnt


def test_layers_keep_their_kind_of_attention():
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    model = make_model(use_sliding_window=True, sliding_window=4, layer_types=kinds)
    assert _sliced(model).config.layer_types == ["full_attention", "sliding_attention"]


def test_the_larger_model_is_not_changed(model):
    before = deepcopy(model.state_dict())
    cut = _sliced(model)
    for weight in cut.parameters():
        weight.data.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
