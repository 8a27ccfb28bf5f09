"""F2LLMConfig: the published shapes, the matryoshka fields, and files that stock Qwen3 reads."""

from __future__ import annotations

import inspect
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, Qwen3Config, Qwen3Model

from modeling_f2llm import FAMILY, F2LLMConfig, F2LLMModel, matryoshka_dims

PUBLISHED_PARAMETERS = {
    "f2llm-v2-80m": 80_084_288,
    "f2llm-v2-160m": 159_185_024,
    "f2llm-v2-330m": 334_349_184,
    "f2llm-v2-0.6b": 596_049_920,
    "f2llm-v2-1.7b": 1_720_574_976,
    "f2llm-v2-4b": 4_022_468_096,
    "f2llm-v2-8b": 7_568_405_504,
    "f2llm-v2-14b": 13_990_394_880,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_every_size_is_a_valid_qwen3_with_the_published_fields(name):
    assert set(FAMILY) == set(PUBLISHED_PARAMETERS)
    config = F2LLMConfig.from_family(name)
    assert F2LLMConfig.from_family(name.upper()).to_dict() == config.to_dict()
    with torch.device("meta"):
        assert F2LLMModel(config).num_parameters() == PUBLISHED_PARAMETERS[name]
    config.validate()
    assert config.model_type == "qwen3"
    assert config.vocab_size == 151936
    assert (config.num_key_value_heads, config.head_dim) == (8, 128)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (151645, 151643, 151643)
    assert config.max_position_embeddings == 40960
    assert config.rms_norm_eps == 1e-6
    assert config.rope_parameters["rope_theta"] == 1_000_000
    assert (config.use_cache, config.tie_word_embeddings, config.attention_bias) == (False, True, False)
    assert config.layer_types == ["full_attention"] * config.num_hidden_layers
    assert config.max_window_layers == config.num_hidden_layers


def test_overrides_replace_published_fields():
    config = F2LLMConfig.from_family("f2llm-v2-80m", vocab_size=1000, num_hidden_layers=3, pad_token_id=0)
    config.validate()
    assert (config.vocab_size, config.pad_token_id, config.hidden_size) == (1000, 0, 320)
    assert config.layer_types == ["full_attention"] * 3
    assert config.max_window_layers <= 3
    with pytest.raises(ValueError, match="f2llm-v2-7b") as error:
        F2LLMConfig.from_family("f2llm-v2-7b")
    assert all(name in str(error.value) for name in FAMILY)


def test_another_vocabulary_has_no_token_of_qwen3():
    config = F2LLMConfig.from_family("f2llm-v2-80m", vocab_size=8192, num_hidden_layers=1)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, None)
    assert F2LLMModel(config).embed_tokens.weight.shape == (8192, 320)
    # A larger one, too: what has such an id there would never be trained as padding.
    assert F2LLMConfig.from_family("f2llm-v2-80m", vocab_size=200_000, eos_token_id=5).pad_token_id is None


def test_a_small_vocabulary_without_padding_loads_as_stock_does(tmp_path):
    stock = Qwen3Config(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=64, head_dim=8)
    stock_model = Qwen3Model(stock)
    stock_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        saved.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    model = F2LLMModel.from_pretrained(tmp_path)
    assert model.config.pad_token_id is None
    assert torch.equal(model.embed_tokens.weight, stock_model.embed_tokens.weight)


def test_layers_keep_to_the_depth_under_the_qwen3_defaults():
    config = F2LLMConfig(hidden_size=32, num_hidden_layers=5)
    assert len(config.layer_types) == 5
    assert config.max_window_layers == 5
    assert F2LLMConfig(hidden_size=32, num_hidden_layers=40).max_window_layers == 28
    with pytest.raises(StrictDataclassClassValidationError, match="layer_types"):
        F2LLMConfig(hidden_size=32, num_hidden_layers=8, layer_types=["full_attention"] * 28)


@pytest.mark.parametrize(
    ("width", "dims"),
    [
        (320, [320, 256, 128, 64, 32, 16, 8]),
        (896, [896, 512, 256, 128, 64, 32, 16, 8]),
        (1024, [1024, 512, 256, 128, 64, 32, 16, 8]),
        (8, [8]),
        (4, [4]),
        (9, [9, 8]),
    ],
)
def test_matryoshka_dimensions_are_the_powers_of_two_and_the_width(width, dims):
    config = F2LLMConfig(hidden_size=width, num_hidden_layers=1)
    assert (config.is_matryoshka, config.matryoshka_dimensions) == (True, dims)
    config = F2LLMConfig(hidden_size=width, num_hidden_layers=1, is_matryoshka=False, matryoshka_dimensions=[4])
    assert (config.is_matryoshka, config.matryoshka_dimensions) == (False, None)


def test_smallest_matryoshka_dimension_can_be_chosen():
    assert matryoshka_dims(320, min_dim=64) == [320, 256, 128, 64]
    assert matryoshka_dims(4, min_dim=1) == [4, 2, 1]
    for min_dim, message in ((0, "between"), (512, "between"), (24, "power of two")):
        with pytest.raises(ValueError, match=message):
            matryoshka_dims(320, min_dim=min_dim)


@pytest.mark.parametrize("dims", [[64, 32], [32, 0], [32, -8]])
def test_dimensions_that_do_not_fit_are_refused(dims, tmp_path):
    with pytest.raises(StrictDataclassClassValidationError, match="hidden_size 32") as error:
        F2LLMConfig(hidden_size=32, num_hidden_layers=1, matryoshka_dimensions=dims)
    assert str([dim for dim in dims if not 1 <= dim <= 32]) in str(error.value)
    config = F2LLMConfig(hidden_size=32, num_hidden_layers=1)
    config.matryoshka_dimensions = dims
    for refused in (config.validate, lambda: config.save_pretrained(tmp_path)):
        with pytest.raises(StrictDataclassClassValidationError, match="hidden_size 32"):
            refused()


def fields_of(config):
    return {name: value for name, value in config.to_dict().items() if name not in ("architectures", "_name_or_path")}


@pytest.fixture(
    params=[
        {},
        {"matryoshka_dimensions": [16, 8]},
        {"is_matryoshka": False},
        {"use_cache": True, "tie_word_embeddings": False, "pad_token_id": None},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ],
    ids=["defaults", "own-dims", "not-matryoshka", "qwen3-values", "sliding-window"],
)
def config(request):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return F2LLMConfig.from_family("f2llm-v2-80m", **shape, **request.param)


@pytest.mark.parametrize("loader", [F2LLMConfig, Qwen3Config, AutoConfig])
def test_saved_config_loads_with_every_field(config, loader, tmp_path):
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is (F2LLMConfig if loader is F2LLMConfig else Qwen3Config)
    assert fields_of(loaded) == fields_of(config)
    loaded.validate()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "qwen3" and saved["architectures"] == ["Qwen3Model"]
    assert saved["is_matryoshka"] is config.is_matryoshka
    assert saved.get("matryoshka_dimensions") == config.matryoshka_dimensions


def test_stock_config_gains_the_matryoshka_fields_and_keeps_its_own(tmp_path):
    stock = Qwen3Config(hidden_size=32, num_hidden_layers=2, vocab_size=64, pad_token_id=None, eos_token_id=7)
    stock.save_pretrained(tmp_path)
    config = F2LLMConfig.from_pretrained(tmp_path)
    assert config.matryoshka_dimensions == [32, 16, 8]
    assert (config.pad_token_id, config.eos_token_id, config.vocab_size) == (None, 7, 64)
    assert (config.tie_word_embeddings, config.use_cache) == (stock.tie_word_embeddings, stock.use_cache)


def import_with(transformers, monkeypatch):
    """The configuration's file, imported as remote code beside another transformers."""
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    spec = spec_from_file_location("configuration_elsewhere", inspect.getsourcefile(F2LLMConfig))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_configuration_that_is_a_plain_class_gets_the_same_fields(monkeypatch, tmp_path):
    class Plain:
        """As Qwen3Config was before transformers 5.4."""

        def __init__(self, hidden_size=4096, num_hidden_layers=32, use_cache=True, **others):
            self.__dict__.update(others, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
            self.use_cache, self.max_window_layers = use_cache, 28

        def save_pretrained(self, save_directory):
            (save_directory / "config.json").write_text(json.dumps(self.__dict__))

        @staticmethod
        def register_for_auto_class(): ...

    older = ModuleType("transformers")
    older.Qwen3Config, older.__version__ = Plain, "4.57.6"
    config_class = import_with(older, monkeypatch).F2LLMConfig
    config = config_class(hidden_size=32, num_hidden_layers=2, pad_token_id=5)
    assert (config.is_matryoshka, config.matryoshka_dimensions, config.max_window_layers) == (True, [32, 16, 8], 2)
    assert (config.use_cache, config.tie_word_embeddings, config.pad_token_id) == (False, True, 5)
    assert config_class(hidden_size=32, is_matryoshka=False, use_cache=True).matryoshka_dimensions is None
    with pytest.raises(ValueError, match="hidden_size 32"):
        config_class(hidden_size=32, matryoshka_dimensions=[64])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["Qwen3Model"] and saved["matryoshka_dimensions"] == [32, 16, 8]


def test_transformers_too_old_for_the_model_says_what_to_do(monkeypatch):
    older = ModuleType("transformers")
    older.Qwen3Config, older.__version__ = Qwen3Config, "4.54.1"
    with pytest.raises(ImportError, match=r"4\.55 or newer \(found 4\.54\.1\): leave out trust_remote_code"):
        import_with(older, monkeypatch)
