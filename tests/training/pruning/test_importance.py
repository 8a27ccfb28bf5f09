"""Statistics are those of stock Qwen3, in any batches and precision; files are checked."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save
from transformers import Qwen3Model

from training.common.run_folder import IMPORTANCE_FILE
from training.pruning.importance import Importance, calibrate, calibration_batches, weight_importance

NAMES = ("norms", "neurons", "change")


def _assert_close(actual, expected, tolerance=1e-5):
    for name in NAMES:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def _by_hand(model, batches):
    """The same statistics text by text, from what the modules of stock Qwen3 read and give, in fp64."""
    stock, seen = Qwen3Model(model.config).eval().double(), {}
    stock.load_state_dict(model.state_dict())
    for name, module in stock.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: (inputs, output)}))
    layers, texts = model.config.num_hidden_layers, [text for ids, each in batches for text in ids[0].split(each)]
    norms = torch.zeros(2 * layers + 1, model.config.hidden_size, dtype=torch.double)
    neurons = torch.zeros(layers, model.config.intermediate_size, dtype=torch.double)
    change = torch.zeros(layers, dtype=torch.double)
    for text in texts:
        stock(input_ids=text[None])
        norms[-1] += seen["norm"][1][0].square().sum(0)
        for number in range(layers):
            (before, *_), after = seen[f"layers.{number}"]
            for row, norm in enumerate(("input_layernorm", "post_attention_layernorm"), 2 * number):
                norms[row] += seen[f"layers.{number}.{norm}"][1][0].square().sum(0)
            neurons[number] += seen[f"layers.{number}.mlp.down_proj"][0][0][0].square().sum(0)
            change[number] += (1 - torch.cosine_similarity(before, after, dim=-1)).sum()
    return Importance(*(total.float() / sum(map(len, texts)) for total in (norms, neurons, change)))


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_summed_in_fp32(model, batches, importance, autocast):
    half = calibrate(model if autocast else model.bfloat16(), batches, autocast=autocast)
    _assert_close(half, importance, 0.05 if autocast else 0.2)
    for name in NAMES:
        assert getattr(half, name).dtype == torch.float32
        assert not torch.allclose(getattr(half, name), getattr(importance, name), rtol=1e-5, atol=1e-7)


def test_calibration_restores_the_model_and_measures_it_uncompiled(
    model, batches, importance, embed_packed, monkeypatch
):
    before = embed_packed(model)
    for layer in model.train().layers:
        layer.compiled = True
    with monkeypatch.context() as patched:
        # The compiled halves of a layer need not call hooks.
        patched.setattr("modeling_f2llm.layers._compiled", lambda *_: pytest.fail("it ran compiled"))
        _assert_close(calibrate(model, batches), importance)
    assert model.training and all(layer.compiled for layer in model.layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for layer in model.layers:
        layer.compiled = False
    assert torch.equal(embed_packed(model.eval()), before)


def test_statistics_are_those_of_stock_qwen3_in_any_batches(model, batches, importance):
    _assert_close(importance, _by_hand(model, batches), 1e-4)
    assert {getattr(importance, name).dtype for name in NAMES} == {torch.float32}
    one_by_one = [(text[None], [len(text)]) for ids, lengths in batches for text in ids[0].split(lengths)]
    _assert_close(calibrate(model, one_by_one), importance)


def test_activations_that_are_not_finite_and_no_text_are_refused(model, batches, refuses):
    with refuses("no token"):
        calibrate(model, [])
    for name in ("norm.weight", "layers.1.self_attn.o_proj.weight"):
        model.get_parameter(name).data[0] = torch.inf
        with refuses("batch 0", "NaN or infinite"):
            calibrate(model, batches)
        model.get_parameter(name).data[0] = 1


def test_a_file_gives_back_what_was_measured_on_this_model(model, importance, tmp_path, refuses):
    importance.save(tmp_path / IMPORTANCE_FILE)
    for path in (tmp_path, tmp_path / IMPORTANCE_FILE):
        _assert_close(Importance.load(path, "the model of the tests"), importance, 0)
    with refuses(IMPORTANCE_FILE, "measured on 'the model of the tests'", "measure this model"):
        Importance.load(tmp_path, "another")
    weight_importance(model, "m").save(tmp_path / IMPORTANCE_FILE)
    assert Importance.load(tmp_path, "m").change is None
    for content in (b"not safetensors", save({"weights": torch.zeros(1)})):
        (tmp_path / IMPORTANCE_FILE).write_bytes(content)
        with refuses(IMPORTANCE_FILE, "no importance", "measure the model again"):
            Importance.load(tmp_path, "m")
    with refuses("absent", "no importance"):
        Importance.load(tmp_path / "absent", "m")


def test_weights_tell_channels_and_neurons_that_do_nothing(model):
    model.get_parameter("layers.1.mlp.down_proj.weight").data[:, 7] = 0
    model.get_parameter("layers.1.mlp.gate_proj.weight").data[9] = 0
    for name, weight in model.named_parameters():
        if name == "embed_tokens.weight":
            weight.data[:, 5] = 0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data[5] = 0
    estimated = weight_importance(model)
    assert (estimated.norms[:, 5] == 0).all()
    assert (estimated.neurons == 0).nonzero().tolist() == [[1, 7], [1, 9]]
    # A norm brings the mean square to one, before its weight.
    weight = model.layers[2].input_layernorm.weight.detach()
    torch.testing.assert_close((estimated.norms[4] / weight.square()).mean(), torch.tensor(1.0))


def test_calibration_draws_from_every_source(prepared_sources):
    def drawn(seed, **keys):
        batches = list(calibration_batches(prepared_sources, 30, seed, **keys))
        assert sum(len(lengths) for _, lengths in batches) == 30
        assert all(input_ids.shape == (1, sum(lengths)) for input_ids, lengths in batches)
        return sorted(torch.cat([ids[0] for ids, _ in batches]))

    assert drawn(0) == drawn(0, max_tokens=100) != drawn(1)
