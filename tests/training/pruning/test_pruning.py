"""Whole prunings: published shapes, loading by stock classes, checks of the result."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModel, Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel, build_sentence_transformer
from tests.training.processes import ROOT, run_bounded
from training.common.errors import UserError
from training.models.model_size import count_parameters
from training.pruning.importance import calibrate, weight_importance
from training.pruning.plan import make_plan
from training.pruning.pruning import apply_plan, prune
from training.pruning.shape import pruned_config

WORKER = ROOT / "tests/training/pruning_worker.py"
SMALLER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
# arXiv 2603.19223, Table 1 and the exact counts that mteb publishes.
PUBLISHED = {"f2llm-v2-80m": 80_084_288, "f2llm-v2-160m": 159_185_024, "f2llm-v2-330m": 334_349_184}


@pytest.fixture
def importance(tiny_model, random_batch):
    ids = random_batch([12, 12])["input_ids"].reshape(1, -1)
    return calibrate(tiny_model, [(ids, [12, 12])])


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_shapes_have_the_published_parameters(name, parameters):
    source = F2LLMConfig.from_family("f2llm-v2-0.6b")
    assert count_parameters(pruned_config(source, {"family": name})) == parameters


@pytest.mark.parametrize("hidden", ["activation_norm", "leading", "reordered"])
@pytest.mark.parametrize("layers", ["first", "change"])
def test_every_method_cuts_to_the_shape(tiny_model, importance, random_batch, hidden, layers):
    target = pruned_config(tiny_model.config, SMALLER)
    pruned = prune(tiny_model, target, importance, hidden=hidden, layers=layers)
    assert pruned(**random_batch([5, 3])).last_hidden_state.shape == (2, 5, 16)
    assert pruned.num_parameters() == count_parameters(target)
    # The formula of the published counts: V h + L (2 h n d + 2 h k d + 2 d + 3 h i + 2 h) + h.
    assert pruned.num_parameters() == 320 * 16 + (2 * 16 * 32 + 2 * 16 * 16 + 2 * 8 + 3 * 16 * 24 + 2 * 16) + 16


def test_pruning_by_nothing_is_the_identity(tiny_model, importance, random_batch):
    pruned = prune(tiny_model, pruned_config(tiny_model.config, {"hidden_size": 32}), importance)
    batch = random_batch([5, 3])
    assert torch.equal(pruned(**batch).last_hidden_state, tiny_model(**batch).last_hidden_state)


def test_without_importance_weights_decide(tiny_model, random_batch, refuses):
    target = pruned_config(tiny_model.config, SMALLER)
    pruned = prune(tiny_model, target)
    expected = prune(tiny_model, target, weight_importance(tiny_model))
    batch = random_batch([5, 3])
    assert torch.equal(pruned(**batch).last_hidden_state, expected(**batch).last_hidden_state)
    with refuses("layers='change'", "calibrate"):
        prune(tiny_model, target, layers="change")


def test_one_measurement_serves_every_shape(tiny_model, importance):
    for width in (8, 16, 24):
        plan = make_plan(
            tiny_model.config, pruned_config(tiny_model.config, {"hidden_size": width}), importance, "reordered"
        )
        assert len(plan.hidden) == width


def test_stock_classes_load_what_was_saved(tiny_model, importance, random_batch, tmp_path):
    pruned = prune(tiny_model, pruned_config(tiny_model.config, SMALLER), importance, hidden="reordered")
    pruned.save_pretrained(tmp_path)
    batch = random_batch([7, 4, 7])
    with torch.no_grad():
        expected = pruned(**batch).last_hidden_state
        for load in (AutoModel.from_pretrained, Qwen3Model.from_pretrained, F2LLMModel.from_pretrained):
            loaded, found = load(tmp_path, output_loading_info=True)
            assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            hidden = loaded.eval()(**batch).last_hidden_state * batch["attention_mask"][..., None]
            torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert AutoModel.from_pretrained(tmp_path).config.matryoshka_dimensions == [16, 8]


def test_the_released_folder_embeds_alike(tiny_model, tiny_tokenizer, importance, sentences, tmp_path):
    from sentence_transformers import SentenceTransformer

    pruned = prune(tiny_model, pruned_config(tiny_model.config, SMALLER), importance)
    ours = build_sentence_transformer(pruned, tiny_tokenizer)
    ours.save_pretrained(str(tmp_path), create_model_card=False)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(
        stock.encode(sentences, convert_to_tensor=True), ours.encode(sentences, convert_to_tensor=True)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named(tiny_model, importance, refuses, value):
    tiny_model.layers[0].mlp.down_proj.weight.data[:, 3] = value
    importance.neurons[0, 3] = 1e9
    with refuses("layers.0.mlp.down_proj.weight", "NaN"):
        prune(tiny_model, pruned_config(tiny_model.config, SMALLER), importance)


def test_an_impossible_shape_costs_no_work(tiny_model):
    target = pruned_config(tiny_model.config, SMALLER)
    target.num_key_value_heads = 4
    plan = make_plan(tiny_model.config, pruned_config(tiny_model.config, SMALLER), weight_importance(tiny_model))
    for cut in (lambda: prune(tiny_model, target), lambda: apply_plan(tiny_model, target, plan)):
        with pytest.raises(UserError, match="num_key_value_heads"):
            cut()


@pytest.mark.slow
def test_published_shapes_are_cut_in_minutes_and_8_gb(tmp_path) -> None:
    ended = run_bounded([sys.executable, str(WORKER), str(tmp_path)], seconds=300)
    assert ended.returncode == 0, ended.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["parameters"] == PUBLISHED
    assert found["peak_mib"] < 8e9 / 2**20
