"""The configuration of the cut model, what each method keeps, and plans that a person can read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from modeling_f2llm import F2LLMConfig
from training.pruning.importance import weight_importance
from training.pruning.plan import as_ranges, default_hidden, make_plan, pruned_config

SOURCE = F2LLMConfig.from_family("f2llm-v2-0.6b")


def test_fields_override_those_of_the_family_and_what_is_left_out_stays():
    before = SOURCE.to_dict()
    for name in ("f2llm-v2-80m", "F2LLM-v2-160M", "f2llm-v2-330m"):
        assert pruned_config(SOURCE, {"family": name}).to_dict() == F2LLMConfig.from_family(name).to_dict()
    assert SOURCE.to_dict() == before
    pruned = pruned_config(SOURCE, {"family": "f2llm-v2-80m", "num_hidden_layers": 4})
    assert (pruned.hidden_size, pruned.intermediate_size, pruned.num_hidden_layers) == (320, 2048, 4)
    assert pruned.layer_types == ["full_attention"] * 4 and pruned.max_window_layers == 4
    narrow = pruned_config(SOURCE, {"hidden_size": 512})
    assert (narrow.num_hidden_layers, narrow.intermediate_size) == (28, 3072)
    # The matryoshka dimensions that fit stay.
    assert narrow.matryoshka_dimensions == [512, 256, 128, 64, 32, 16, 8]
    for given, kept in (
        ({"matryoshka_dimensions": [1024, 300, 100]}, [512, 300, 100]),
        ({"is_matryoshka": False}, None),
    ):
        source = F2LLMConfig.from_family("f2llm-v2-0.6b", **given)
        assert pruned_config(source, {"hidden_size": 512}).matryoshka_dimensions == kept


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ({}, ["names no shape", "family"]),
        ({"hidden_sizes": 320}, ["hidden_sizes", "did you mean 'hidden_size'"]),
        ({"num_attention_heads": 8}, ["unknown key 'num_attention_heads'"]),
        ({"family": "f2llm-v2-81m"}, ["unknown key 'f2llm-v2-81m'", "f2llm-v2-80m"]),
        ({"family": "f2llm-v2-4b"}, ["32 attention heads", "16"]),
        ({"family": "f2llm-v2-1.7b"}, ["hidden_size 2048", "more than the 1024"]),
        ({"num_hidden_layers": 29}, ["num_hidden_layers 29", "more than the 28"]),
        ({"hidden_size": 0}, ["hidden_size must be a whole number of at least 1"]),
        ({"hidden_size": 330}, ["multiple of the 16 attention heads", "take 320"]),
        ({"hidden_size": 5}, ["multiple of the 16 attention heads", "take 16"]),
        ({"hidden_size": "320"}, ["whole number", "'320'"]),
        ({"hidden_size": True}, ["whole number"]),
    ],
)
def test_impossible_shapes_are_refused(shape, parts, refuses):
    with refuses("prune_to", *parts):
        pruned_config(SOURCE, shape)


def test_leading_channels_stay_of_a_model_that_says_it_was_trained_with_matryoshka():
    said = {"is_matryoshka": True}
    assert default_hidden(SOURCE, said)[0] == "leading"
    # A stock Qwen3 says nothing, and its configuration assumes it.
    assert SOURCE.is_matryoshka and default_hidden(SOURCE, {})[0] == "published"
    for plain in ({"is_matryoshka": False}, {"matryoshka_dimensions": [SOURCE.hidden_size]}):
        config = F2LLMConfig.from_family("f2llm-v2-0.6b", **plain)
        assert default_hidden(config, said)[0] == "published"


@pytest.fixture
def target(model):
    return pruned_config(model.config, {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2})


def _ranked(model, channels):
    """An importance to which these channels matter most, the first of them most of all."""
    norms = torch.zeros(7, model.config.hidden_size)
    for rank, channel in enumerate(channels):
        norms[:, channel] = 100.0 - rank
    return replace(weight_importance(model), norms=norms, change=torch.tensor([0.1, 0.3, 0.2]))


def test_the_largest_norms_the_leading_channels_or_the_layers_of_most_change_stay(model, target, importance, refuses):
    plan = make_plan(model.config, target, importance)
    assert plan.hidden == tuple(sorted(importance.norms[[0, 1, 2, 3, 6]].sqrt().sum(0).argsort()[-8:].tolist()))
    for layer, neurons in zip(plan.layers, plan.neurons, strict=True):
        assert neurons == tuple(sorted(importance.neurons[layer].argsort()[-20:].tolist()))
    assert plan.layers == (0, 1)
    assert make_plan(model.config, target, importance, hidden="leading").hidden == tuple(range(8))
    plan = make_plan(model.config, target, _ranked(model, []), layers="change")
    # Of equal channels the first stay; layers keep their own order.
    assert (plan.hidden, plan.layers) == (tuple(range(8)), (1, 2))
    with refuses("layers='change'", "calibrate"):
        make_plan(model.config, target, weight_importance(model), layers="change")


def test_reordered_channels_fill_the_gaps_among_the_leading_ones_and_a_person_can_read_it(model, target, tmp_path):
    importance = _ranked(model, [20, 3, 31, 0, 9, 5, 7, 6])
    plan = make_plan(model.config, target, importance, "reordered", "change")
    # 0, 3, 5, 6 and 7 keep their numbers; 20, 31 and 9 get 1, 2 and 4 in falling importance.
    assert plan.hidden == (0, 20, 31, 3, 9, 5, 6, 7)
    assert make_plan(model.config, target, importance).hidden == tuple(sorted(plan.hidden))
    plan.save(tmp_path / "plan.yaml")
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert content["source"] == {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    assert content["methods"] == {"hidden": "reordered", "layers": "change"}
    assert (content["hidden"], content["layers"]) == ("0 20 31 3 9 5-7", "1-2")
    assert content["neurons"] == {layer: as_ranges(plan.neurons[number]) for number, layer in enumerate((1, 2))}
    assert as_ranges([0, 1, 2, 3, 5, *range(9, 21), 3, 2]) == "0-3 5 9-20 3 2" and as_ranges([]) == ""
