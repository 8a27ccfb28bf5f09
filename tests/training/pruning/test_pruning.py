"""Published shapes, loading by stock classes, and every kept weight where it belongs."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModel, Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.training.processes import ROOT, run_bounded
from tests.training.pruning.pruned_models import make_model
from training.models.model_folder import count_parameters
from training.pruning.importance import calibrate, weight_importance
from training.pruning.plan import PruningPlan, make_plan, pruned_config
from training.pruning.pruning import apply_plan, prune

WORKER = ROOT / "tests/training/pruning_worker.py"
SMALLER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
# arXiv 2603.19223, Table 1 and the exact counts that mteb publishes.
PUBLISHED = {"f2llm-v2-80m": 80_084_288, "f2llm-v2-160m": 159_185_024, "f2llm-v2-330m": 334_349_184}


@pytest.fixture
def measured(tiny_model, random_batch):
    ids = random_batch([12, 12])["input_ids"].reshape(1, -1)
    return calibrate(tiny_model, [(ids, [12, 12])])


@pytest.mark.parametrize("hidden", ["published", "leading", "reordered"])
@pytest.mark.parametrize("layers", ["first", "change"])
def test_every_method_cuts_to_the_shape(tiny_model, measured, random_batch, hidden, layers):
    source = F2LLMConfig.from_family("f2llm-v2-0.6b")
    assert {name: count_parameters(pruned_config(source, {"family": name})) for name in PUBLISHED} == PUBLISHED
    target = pruned_config(tiny_model.config, SMALLER)
    pruned = prune(tiny_model, target, measured, hidden=hidden, layers=layers)
    assert pruned(**random_batch([5, 3])).last_hidden_state.shape == (2, 5, 16)
    assert pruned.num_parameters() == count_parameters(target)
    # The formula of the published counts: V h + L (2 h n d + 2 h k d + 2 d + 3 h i + 2 h) + h.
    assert pruned.num_parameters() == 320 * 16 + (2 * 16 * 32 + 2 * 16 * 16 + 2 * 8 + 3 * 16 * 24 + 2 * 16) + 16


def test_stock_classes_load_what_was_saved_and_without_importance_weights_decide(
    tiny_model, measured, random_batch, tmp_path
):
    target, batch = pruned_config(tiny_model.config, SMALLER), random_batch([7, 4, 7])
    pruned, expected = prune(tiny_model, target), prune(tiny_model, target, weight_importance(tiny_model))
    assert torch.equal(pruned(**batch).last_hidden_state, expected(**batch).last_hidden_state)
    pruned = prune(tiny_model, target, measured, hidden="reordered")
    pruned.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = pruned(**batch).last_hidden_state
        for load in (AutoModel.from_pretrained, Qwen3Model.from_pretrained, F2LLMModel.from_pretrained):
            loaded, found = load(tmp_path, output_loading_info=True)
            assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            hidden = loaded.eval()(**batch).last_hidden_state * batch["attention_mask"][..., None]
            torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert AutoModel.from_pretrained(tmp_path).config.matryoshka_dimensions == [16, 8]


def test_a_weight_that_is_not_finite_is_named(tiny_model, measured, refuses):
    tiny_model.layers[0].mlp.down_proj.weight.data[:, 3] = torch.inf
    measured.neurons[0, 3] = 1e9
    with refuses("layers.0.mlp.down_proj.weight", "NaN"):
        prune(tiny_model, pruned_config(tiny_model.config, SMALLER), measured)


@pytest.mark.slow
def test_published_shapes_are_cut_in_minutes_and_8_gb(tmp_path):
    ended = run_bounded([sys.executable, str(WORKER), str(tmp_path)], seconds=300)
    assert ended.returncode == 0, ended.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parameters"] == PUBLISHED
    assert found["peak_mib"] < 8e9 / 2**20


HIDDEN = (0, 20, 31, 3, 9, 5, 6, 7)
LAYERS = (0, 2)
NEURONS = ((1, 4, 7, 40), (0, 2, 3, 47))


def _sliced(model, hidden=HIDDEN, layers=LAYERS, neurons=NEURONS):
    shape = {"hidden_size": len(hidden), "intermediate_size": len(neurons[0]), "num_hidden_layers": len(layers)}
    return apply_plan(model, pruned_config(model.config, shape), PruningPlan(hidden, layers, neurons, {}, {}))


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}])
def test_every_weight_is_where_the_plan_says(fields):
    model = make_model(**fields)
    whole, cut = model.state_dict(), dict(_sliced(model).named_parameters())
    hidden = torch.tensor(HIDDEN)
    expected = {
        "embed_tokens.weight": whole["embed_tokens.weight"][:, hidden],
        "norm.weight": whole["norm.weight"][hidden],
    }
    for new, (old, neurons) in enumerate(zip(LAYERS, map(torch.tensor, NEURONS), strict=True)):
        for name in (name for name in whole if name.startswith(f"layers.{old}.")):
            part, weight = name.split(".")[-2], whole[name]
            if part in ("gate_proj", "up_proj"):
                weight = weight[neurons][:, hidden]
            elif part == "down_proj":
                weight = weight[hidden][:, neurons]
            elif part in ("o_proj", "input_layernorm", "post_attention_layernorm"):
                weight = weight[hidden]
            elif part in ("q_proj", "k_proj", "v_proj") and name.endswith("weight"):
                weight = weight[:, hidden]
            expected[name.replace(f".{old}.", f".{new}.", 1)] = weight
    assert cut.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(cut[name], expected[name])] == []


def test_pruning_by_nothing_is_the_identity(model, importance, embed_packed):
    plan = make_plan(model.config, model.config, importance)
    same = apply_plan(model, model.config, plan)
    # The configuration of a new model has no dtype.
    assert same.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}
    state = model.state_dict()
    assert same.state_dict().keys() == state.keys()
    for name, weight in same.state_dict().items():
        assert torch.equal(weight, state[name]) and weight.data_ptr() != state[name].data_ptr(), name
    assert torch.equal(embed_packed(same), embed_packed(model))


def test_channels_that_carry_zeros_leave_the_others_as_they_were(model, embed_packed):
    dropped = [channel for channel in range(32) if channel not in HIDDEN]
    model.embed_tokens.weight.data[:, dropped] = 0
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data[dropped] = 0
        layer.mlp.down_proj.weight.data[dropped] = 0
    cut = _sliced(model, layers=(0, 1, 2), neurons=(tuple(range(48)),) * 3)
    # The mean square over 32 channels, 24 of them zeros, is a quarter of that over the 8 others: a norm over the 8
    # alone, with epsilon in the same proportion, gives half as much. The norms of heads do not change.
    for name, module in cut.named_modules():
        if name == "norm" or name.endswith("layernorm"):
            module.weight.data *= (32 / 8) ** 0.5
            module.variance_epsilon *= 32 / 8
    torch.testing.assert_close(embed_packed(cut), embed_packed(model)[:, list(HIDDEN)], rtol=1e-5, atol=1e-5)


def test_dtype_mode_gradients_and_kinds_of_attention_are_kept(model):
    cut = _sliced(model.bfloat16().train())
    assert {weight.dtype for weight in cut.parameters()} == {torch.bfloat16} == {cut.config.dtype}
    assert all(weight.requires_grad and weight.is_leaf for weight in cut.parameters())
    assert cut.training and not _sliced(model.eval()).training
    # The padding token may end texts and is then trained.
    assert cut.config.pad_token_id == model.config.pad_token_id == 0 and cut.embed_tokens.padding_idx is None
    assert cut.rotary_emb.inv_freq.dtype == torch.float32
    # Layers keep their kind of attention.
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    model = make_model(use_sliding_window=True, sliding_window=4, layer_types=kinds)
    assert _sliced(model).config.layer_types == ["full_attention", "sliding_attention"]
