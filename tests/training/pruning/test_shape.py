"""The configuration of the cut model, and what cannot be cut."""

from __future__ import annotations

import pytest
from training.pruning.shape import check_shape

from modeling_f2llm import FAMILY, F2LLMConfig
from training.pruning.plan import pruned_config

SOURCE = F2LLMConfig.from_family("f2llm-v2-0.6b")


@pytest.mark.parametrize("name", ["f2llm-v2-80m", "F2LLM-v2-160M", "f2llm-v2-330m"])
def test_a_family_name_gives_the_published_configuration(name):
    before = SOURCE.to_dict()
    pruned = pruned_config(SOURCE, {"family": name})
    assert SOURCE.to_dict() == before
    assert pruned.to_dict() == F2LLMConfig.from_family(name).to_dict()


def test_fields_override_those_of_the_family_and_what_is_left_out_stays():
    pruned = pruned_config(SOURCE, {"family": "f2llm-v2-80m", "num_hidden_layers": 4})
    assert (pruned.hidden_size, pruned.intermediate_size, pruned.num_hidden_layers) == (320, 2048, 4)
    assert pruned.layer_types == ["full_attention"] * 4 and pruned.max_window_layers == 4
    narrow = pruned_config(SOURCE, {"hidden_size": 512})
    assert (narrow.num_hidden_layers, narrow.intermediate_size) == (28, 3072)
    assert narrow.matryoshka_dimensions == [512, 256, 128, 64, 32, 16, 8]


def test_matryoshka_dimensions_that_fit_stay():
    source = F2LLMConfig.from_family("f2llm-v2-0.6b", matryoshka_dimensions=[1024, 300, 100])
    assert pruned_config(source, {"hidden_size": 256}).matryoshka_dimensions == [256, 100]
    plain = F2LLMConfig.from_family("f2llm-v2-0.6b", is_matryoshka=False)
    assert pruned_config(plain, {"hidden_size": 256}).matryoshka_dimensions is None


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ({}, ["names no shape", "family"]),
        ({"hidden_sizes": 320}, ["hidden_sizes", "did you mean 'hidden_size'"]),
        ({"num_attention_heads": 8}, ["unknown key 'num_attention_heads'"]),
        ({"family": "f2llm-v2-81m"}, ["unknown key 'f2llm-v2-81m'", "f2llm-v2-80m"]),
        ({"family": "f2llm-v2-4b"}, ["32 attention heads", "16"]),
        ({"family": "f2llm-v2-1.7b"}, ["hidden_size 2048", "more than the 1024"]),
        ({"hidden_size": 2048}, ["hidden_size 2048", "more than the 1024"]),
        ({"intermediate_size": 4096}, ["intermediate_size 4096", "more than the 3072"]),
        ({"num_hidden_layers": 29}, ["num_hidden_layers 29", "more than the 28"]),
        ({"hidden_size": 0}, ["hidden_size must be at least 1"]),
        ({"num_hidden_layers": -2}, ["num_hidden_layers must be at least 1"]),
        ({"hidden_size": 330}, ["multiple of the 16 attention heads", "take 320"]),
        ({"hidden_size": 5}, ["multiple of the 16 attention heads", "take 16"]),
        ({"hidden_size": "320"}, ["whole number", "'320'"]),
        ({"hidden_size": 320.0}, ["whole number"]),
        ({"hidden_size": True}, ["whole number"]),
        ({"hidden_size": None}, ["whole number"]),
    ],
)
def test_impossible_shapes_are_refused(shape, parts, refuses):
    with refuses("prune_to", *parts):
        pruned_config(SOURCE, shape)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 64),
        ("vocab_size", 1000),
        ("rms_norm_eps", 1e-5),
    ],
)
def test_other_fields_must_be_equal(field, value, refuses):
    pruned = pruned_config(SOURCE, {"family": "f2llm-v2-80m"})
    setattr(pruned, field, value)
    with refuses(field, value, "pruning does not change it"):
        check_shape(SOURCE, pruned)


def test_the_families_of_16_heads_are_those_that_the_paper_prunes():
    fits = []
    for name in FAMILY:
        try:
            pruned_config(SOURCE, {"family": name})
        except ValueError:
            continue
        fits.append(name)
    assert fits == ["f2llm-v2-80m", "f2llm-v2-160m", "f2llm-v2-330m", "f2llm-v2-0.6b"]
