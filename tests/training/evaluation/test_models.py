"""Which model is meant, and what mteb's registry says of it."""

from __future__ import annotations

import pytest

pytest.importorskip("mteb")

from mteb.models.model_implementations import MODEL_REGISTRY

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common.errors import UserError
from training.evaluation.models import load_model

PUBLISHED = MODEL_REGISTRY["codefuse-ai/F2LLM-v2-80M"]


@pytest.fixture
def model(tiny_model, tiny_tokenizer):
    return build_sentence_transformer(tiny_model, tiny_tokenizer)


@pytest.fixture
def folder(tmp_path, model):
    model.save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def load(name, **options):
    return load_model(str(name), None, 8192, **options)


def test_a_model_trained_with_instructions_gets_the_published_ones_and_its_own_beside(folder):
    prompts = load(folder).prompts
    assert prompts.by_task == PUBLISHED.loader_kwargs["prompts_dict"] and len(prompts.by_task) == 395
    assert prompts.template == "Instruct: {instruction}\nQuery: "
    assert prompts.default == prompts.own["query"] and prompts.default.startswith("Instruct: ")


def test_a_model_trained_without_instructions_gets_none_unless_told(tmp_path, tiny_model, tiny_tokenizer, caplog):
    build_sentence_transformer(tiny_model, tiny_tokenizer, {"query": "", "document": ""}).save_pretrained(str(tmp_path))
    found = load(tmp_path)
    assert found.prompts.template is None and not any(found.prompts.own.values())
    assert "has no prompts" in caplog.text
    assert load(tmp_path, prompts="published").prompts.template is not None


def test_its_own_prompts_alone_are_another_experiment(folder):
    own = load(folder, prompts="model")
    assert own.prompts.template is None and own.prompts.default.startswith("Instruct: ")
    assert own.meta.experiment_kwargs == {"prompts": "model"}
    assert own.record.label == f"{folder} (prompts model)" and load(folder).record.label == str(folder)
    assert own.meta.revision == load(folder).meta.revision


def test_a_published_model_is_loaded_as_the_registry_says(folder, monkeypatch, tiny_tokenizer):
    from training.models import encoders, missing_weights, reference, settings

    name, asked = PUBLISHED.name, {}
    local = encoders.SentenceTransformer

    def from_folder(place, **options):
        asked.update(options, place=place)
        return local(str(folder), trust_remote_code=True)

    monkeypatch.setattr(encoders, "SentenceTransformer", from_folder)
    monkeypatch.setattr(reference, "model_revision", lambda place, key, revision: revision)
    monkeypatch.setattr(settings, "model_file", lambda place, file, revision=None: folder / file)
    monkeypatch.setattr(missing_weights, "model_file", lambda place, file, revision=None: folder / file)
    found = load(name)
    assert asked["place"] == name and asked["revision"] == PUBLISHED.revision
    assert asked["model_kwargs"] == {"dtype": "bfloat16"} and asked["trust_remote_code"] is False
    assert found.meta.name == name and found.meta.revision == PUBLISHED.revision
    assert found.prompts.by_task == PUBLISHED.loader_kwargs["prompts_dict"] and not found.prompts.own
    assert found.store.model.tokenizer("a").input_ids[-1] == found.store.model.tokenizer.eos_token_id


def test_the_models_default_prompt_goes_where_no_other_fits(tmp_path, tiny_model, tiny_tokenizer):
    plain = build_sentence_transformer(tiny_model, tiny_tokenizer, {"query": "q: ", "first": "f: "})
    plain.default_prompt_name = "first"
    plain.save_pretrained(str(tmp_path))
    assert load(tmp_path).prompts.default == "f: "


def test_texts_are_cut_at_the_length_asked_for(folder, model, caplog):
    assert load_model(str(folder), None, 4).store.model.max_seq_length == 4
    assert load(folder).store.model.max_seq_length == model.max_seq_length
    assert "tokens of a text at most" not in caplog.text
    assert load_model(str(folder), None, 4096).store.model.max_seq_length == model.max_seq_length
    assert f"reads {model.max_seq_length} tokens of a text at most, not --max-length 4096" in caplog.text


def test_no_such_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        load(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor to be had from the Hub"):
        load("nobody/nothing")
