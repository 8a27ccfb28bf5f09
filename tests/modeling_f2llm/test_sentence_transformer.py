"""The SentenceTransformer and the released folder: stock libraries alone load it and compute the same embeddings."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn.functional import normalize

from modeling_f2llm import DEFAULT_PROMPTS, F2LLMConfig, F2LLMModel, append_eos, build_sentence_transformer
from tests.conftest import EOS


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return deepcopy(tiny_tokenizer)


@pytest.fixture
def built(tiny_model, tokenizer):
    return build_sentence_transformer(tiny_model, tokenizer)


@pytest.fixture(scope="module")
def released_json(released_folder):
    return {path.name: json.loads(path.read_text()) for path in released_folder.glob("*.json")}


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def by_hand(model, tokenizer, texts):
    """The last hidden state at EOS, text by text, at unit length."""
    last = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids])
            assert ids[0, -1] == tokenizer.eos_token_id
            last.append(model(input_ids=ids).last_hidden_state[0, -1])
    return normalize(torch.stack(last), dim=-1).numpy()


def test_documents_are_the_normalised_last_token(built, tiny_model, tokenizer, sentences):
    expected = by_hand(tiny_model, tokenizer, sentences)
    assert_same(built.encode_document(sentences), expected)
    assert_same(built.encode(sentences), expected)
    assert_same(np.linalg.norm(expected, axis=1), np.ones(len(sentences)))
    assert [type(module) for module in built] == [Transformer, Pooling, Normalize]
    # The model is shared, not copied.
    assert built[0].auto_model is tiny_model and built.get_embedding_dimension() == 32
    assert_same(built.similarity(expected, expected[:2]).numpy(), expected @ expected[:2].T)


def test_queries_carry_the_published_prompt(built, tiny_model, tokenizer, sentences):
    prompt = "Instruct: Given a question, retrieve passages that can help answer the question.\nQuery: "
    expected = by_hand(tiny_model, tokenizer, [prompt + text for text in sentences])
    assert_same(built.encode_query(sentences), expected)
    assert_same(built.encode(sentences, prompt_name="query"), expected)
    assert built.prompts == DEFAULT_PROMPTS
    own = build_sentence_transformer(tiny_model, tokenizer, {"query": "Q: ", "document": "D: "})
    assert_same(own.encode_query(sentences), by_hand(tiny_model, tokenizer, ["Q: " + text for text in sentences]))
    assert_same(own.encode_document(sentences), by_hand(tiny_model, tokenizer, ["D: " + text for text in sentences]))


def test_a_longer_text_is_cut_before_eos(built, tiny_model, tokenizer):
    built.max_seq_length = 6
    text = "Giant pandas live in the mountain forests of Sichuan."
    ids = [*tokenizer(text).input_ids[:5], tokenizer.eos_token_id]
    with torch.no_grad():
        expected = normalize(tiny_model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1], dim=-1)
    assert_same(built.encode_document([text]), expected.numpy())


def test_a_tokenizer_gains_eos_while_building(tiny_model, tokenizer):
    bare = deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None
    assert bare("text").input_ids == tokenizer("text").input_ids[:-1]
    built = build_sentence_transformer(tiny_model, bare)
    assert bare("text").input_ids == tokenizer("text").input_ids
    assert_same(built.encode_document(["text"]), by_hand(tiny_model, tokenizer, ["text"]))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_config, tiny_tokenizer):
    tokens = len(tiny_tokenizer)
    fitting, small = (
        F2LLMModel(F2LLMConfig(**{**tiny_config.to_dict(), "vocab_size": size})) for size in (tokens, tokens - 1)
    )
    build_sentence_transformer(fitting, deepcopy(tiny_tokenizer))
    with pytest.raises(ValueError, match=f"the tokenizer has {tokens} tokens but the model only {tokens - 1}"):
        build_sentence_transformer(small, deepcopy(tiny_tokenizer))


# -- the released folder -----------------------------------------------------------------------------------------------


def test_released_files_state_what_servers_read_and_hold_no_pickle(released_json, released_folder):
    config = released_json["config.json"]
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["Qwen3Model"]
    assert config["is_matryoshka"] is True
    assert config["matryoshka_dimensions"] == [32, 16, 8]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_f2llm.F2LLMConfig",
        "AutoModel": "modeling_f2llm.F2LLMModel",
    }
    config = released_json["config_sentence_transformers.json"]
    assert config["prompts"] == DEFAULT_PROMPTS
    assert config["similarity_fn_name"] == "cosine"
    pooling = json.loads((released_folder / "1_Pooling" / "config.json").read_text())
    assert (pooling["pooling_mode"], pooling["embedding_dimension"]) == ("lasttoken", 32)
    assert pooling["include_prompt"] is True
    # The code is complete.
    code = {"attention.py", "configuration_f2llm.py", "layers.py", "modeling_f2llm.py", "packing.py"}
    files = {path.name for path in released_folder.rglob("*") if path.suffix not in (".json", ".jinja", ".md", "")}
    assert files == {"model.safetensors", *code}


@pytest.mark.parametrize(
    ("name", "class_name"), [("st", "Qwen3Model"), ("st_truncated", "Qwen3Model"), ("st_remote", "F2LLMModel")]
)
def test_sentence_transformers_alone_gives_the_same_embeddings(built, loaded_elsewhere, sentences, name, class_name):
    arrays, facts = loaded_elsewhere
    assert facts[f"{name}_class"] == class_name
    assert facts[f"{name}_modules"] == ["sentence_transformers"] * 3
    for kind, encode in {"query": built.encode_query, "document": built.encode_document}.items():
        expected = encode(sentences)
        assert_same(arrays[f"{name}_{kind}"], expected[:, :8] if name == "st_truncated" else expected)


def test_saving_a_loaded_release_gives_the_same_weights_and_embeddings(released_folder, built, sentences, tmp_path):
    model = F2LLMModel.from_pretrained(released_folder)
    again = build_sentence_transformer(model, append_eos(built.tokenizer))
    again.save_pretrained(str(tmp_path))
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == {
        p.relative_to(released_folder) for p in released_folder.rglob("*")
    }
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert_same(loaded.encode_query(sentences), built.encode_query(sentences))


@pytest.mark.parametrize("pad_token", ["<|im_end|>", None])
def test_padding_with_eos_changes_no_embedding(tiny_model, tiny_tokenizer, sentences, pad_token, tmp_path):
    expected = build_sentence_transformer(tiny_model, deepcopy(tiny_tokenizer)).encode(sentences)
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.pad_token = pad_token
    tiny_model.config.pad_token_id = None
    build_sentence_transformer(tiny_model, tokenizer).save_pretrained(str(tmp_path))
    for trust_remote_code in (False, True):
        model = SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=trust_remote_code)
        assert model.tokenizer.pad_token_id == model[0].auto_model.config.pad_token_id == EOS
        np.testing.assert_allclose(model.encode(sentences), expected, atol=1e-5)
