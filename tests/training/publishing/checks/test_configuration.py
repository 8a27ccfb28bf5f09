"""Faults of ``config.json``."""

from __future__ import annotations

import pytest

from tests.training.publishing.broken import BrokenRelease

CONFIG = "config.json"


def test_an_unknown_model_type(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, model_type="f2llm")
    faults = broken.faults()
    assert any(fault.startswith("config.json: model_type is 'f2llm'") for fault in faults)


def test_another_architecture(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, architectures=["Qwen3ForCausalLM"])
    broken.expect((CONFIG, "Qwen3ForCausalLM"))


def test_layer_types_of_an_unpruned_model(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, lambda config: config["layer_types"].append("full_attention"))
    faults = broken.faults()
    assert any("3 layer_types for 2 layers" in fault for fault in faults)
    assert any("Qwen3Config refuses it" in fault for fault in faults)


def test_a_window_of_more_layers(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, max_window_layers=28)
    broken.expect((CONFIG, "max_window_layers 28", "set it to 2"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"is_matryoshka": ...}, "is_matryoshka is not true"),
        ({"matryoshka_dimensions": ...}, "matryoshka_dimensions is missing"),
        ({"matryoshka_dimensions": [16, 32, 8]}, "do not start with hidden_size 32"),
    ],
)
def test_dimensions_that_servers_refuse(broken: BrokenRelease, keys: dict, said: str) -> None:
    broken.edit(CONFIG, **keys)
    broken.expect((CONFIG, said))


def test_a_dimension_wider_than_the_model(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, matryoshka_dimensions=[64, 32, 16, 8])
    faults = broken.faults()
    assert any("matryoshka_dimensions [64] do not fit hidden_size 32" in fault for fault in faults)


def test_dimensions_that_are_not_those_of_the_record(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, matryoshka_dimensions=[32, 8])
    broken.expect(("release.json", "[32, 16, 8]", "[32, 8]"))


def test_a_shape_that_is_not_that_of_the_record(broken: BrokenRelease) -> None:
    broken.edit("release.json", lambda record: record["shape"].update(num_hidden_layers=3))
    broken.expect(("release.json", "num_hidden_layers is 3"))


def test_a_tokenizer_that_lets_texts_grow_too_long(broken: BrokenRelease) -> None:
    length = broken.read(CONFIG)["max_position_embeddings"] + 1
    broken.edit("tokenizer_config.json", model_max_length=length)
    broken.expect(("tokenizer_config.json", f"model_max_length {length} is more than"))


def test_a_length_of_sentence_transformers_alone(broken: BrokenRelease) -> None:
    broken.edit("sentence_bert_config.json", max_seq_length=7)
    broken.expect(("sentence_bert_config.json", "max_seq_length 7"))


def test_a_length_that_is_not_that_of_the_record(broken: BrokenRelease) -> None:
    broken.edit("tokenizer_config.json", model_max_length=20)
    broken.edit("sentence_bert_config.json", max_seq_length=20)
    broken.expect(("release.json", "the tokenizer truncates at 20"))
