"""Folders: what saving writes, what loading gives back, with this package and without."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.modeling_f2llm.comparing import LENGTHS, assert_same, real


@pytest.mark.parametrize("tied", [True, False])
def test_a_causal_lm_folder_loads_as_its_encoder(tmp_path, tiny_config, random_batch, tied):
    names = Qwen3Config().to_dict().keys() & tiny_config.to_dict().keys() - {"architectures"}
    config = Qwen3Config(**{name: tiny_config.to_dict()[name] for name in names} | {"tie_word_embeddings": tied})
    causal = Qwen3ForCausalLM(config).eval()
    assert (causal.lm_head.weight is causal.model.embed_tokens.weight) == tied
    causal.save_pretrained(tmp_path)

    model, report = F2LLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    expected = causal.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    batch = random_batch(LENGTHS)
    assert_same(model(**batch).last_hidden_state, real(causal.model(**batch).last_hidden_state, batch))


def test_saving_and_loading_changes_nothing(tiny_model, saved_folder, padded):
    loaded = F2LLMModel.from_pretrained(saved_folder)
    assert isinstance(loaded.config, F2LLMConfig)
    assert loaded.config.matryoshka_dimensions == [32, 16, 8]
    expected = tiny_model(**padded).last_hidden_state
    for each in (loaded, deepcopy(loaded)):
        assert torch.equal(each(**padded).last_hidden_state, expected)
    code = ["attention.py", "configuration_f2llm.py", "layers.py", "modeling_f2llm.py", "packing.py"]
    assert sorted(path.name for path in saved_folder.iterdir()) == sorted(["config.json", "model.safetensors", *code])


def test_the_chosen_implementation_is_not_saved(saved_folder, tmp_path):
    F2LLMModel.from_pretrained(saved_folder, attn_implementation="eager").save_pretrained(tmp_path)
    assert F2LLMModel.from_pretrained(tmp_path).config._attn_implementation == "packed"
    assert "packed" not in (tmp_path / "config.json").read_text()


def test_stock_runs_on_the_config_of_a_loaded_model(tiny_model, saved_folder, padded):
    # The config carries the name of the packed implementation along: it must work in Qwen3Model, mask and all.
    stock = Qwen3Model.from_pretrained(saved_folder, config=tiny_model.config).eval()
    expected = tiny_model(**padded).last_hidden_state
    assert_same(real(stock(**padded).last_hidden_state, padded), expected)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("stock", "Qwen3Model"),
        ("remote", "F2LLMModel"),
        ("resaved_stock", "Qwen3Model"),
        ("resaved_remote", "F2LLMModel"),
    ],
)
def test_folder_loads_without_the_package(tiny_model, loaded_elsewhere, saved_folder, token_batch, name, class_name):
    arrays, facts = loaded_elsewhere
    assert facts["config_class"] == "F2LLMConfig"
    assert facts["resaved_files"] == sorted(path.name for path in saved_folder.iterdir())
    assert facts[f"{name}_class"] == class_name
    assert facts[f"{name}_package"] == ("transformers" if class_name == "Qwen3Model" else "transformers_modules")
    assert facts[f"{name}_is_padding_zero"] == (class_name == "F2LLMModel")
    with torch.no_grad():
        expected = tiny_model(**token_batch).last_hidden_state
    np.testing.assert_allclose(arrays[f"{name}_hidden"], expected.numpy(), rtol=0, atol=1e-5 * expected.abs().max())
