"""Any Qwen3 embedder as a start: the folder that a stage would save before its first step embeds as the start does."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from modeling_f2llm.prompts import DEFAULT_PROMPTS, instruct
from tests.training.distributed_recipe import save_model
from tests.training.models.starts import QWEN3_PROMPTS, edit_json, save_like_qwen3_embedding, save_plain
from tests.training.recipes import NO_NEW_MODEL, write_single_stage
from training.config.recipe import load_recipe
from training.data.prepared import PreparedSource
from training.prepare import main as prepare_main
from training.stages.setup import set_up

TEXTS = ["Where do giant pandas live?", "a", "大熊猫生活在四川的山林里。", "", "the red river\n\n", "word " * 40]
OURS = instruct("Given a phrase, retrieve its inversion.")


def _prompts_in(folder):
    return json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]


def _set_prompts(folder, prompts):
    edit_json(folder / "config_sentence_transformers.json", prompts=prompts)


def _edit_weights(folder, edit):
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def _with_head(weights):
    """A causal model's names, and its head, which is tied to the embeddings."""
    named = {f"model.{name}": weight for name, weight in weights.items()}
    return {**named, "lm_head.weight": named["model.embed_tokens.weight"].clone()}


@pytest.fixture(
    params=["stock", "left", "head", "bfloat16", "prompt without a template", "both", "empty prompt", "plain", "ours"],
)
def start(request, tmp_path, tiny_config, tiny_tokenizer):
    """A folder to start from, and the query prompt that sources without an instruction are trained with."""
    if request.param == "plain":
        return save_plain(tmp_path / "start", tiny_config, tiny_tokenizer), DEFAULT_PROMPTS["query"]
    if request.param == "ours":
        save_model(tmp_path / "start", tiny_config, tiny_tokenizer)
        _set_prompts(tmp_path / "start", {"query": OURS, "document": ""})
        return tmp_path / "start", OURS
    folder = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer)
    special = {"prompt without a template": "search for: ", "both": "search for: ", "empty prompt": ""}
    query = special.get(request.param, QWEN3_PROMPTS["query"])
    document = "about: " if request.param == "both" else ""
    _set_prompts(folder, {"query": query, "document": document, "topic": "Topic: "})
    if request.param == "left":
        edit_json(folder / "tokenizer_config.json", padding_side="left")
    if request.param == "head":
        edit_json(folder / "config.json", tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"])
        _edit_weights(folder, _with_head)
    if request.param == "bfloat16":
        edit_json(folder / "config.json", dtype="bfloat16")
        _edit_weights(folder, lambda weights: {name: weight.bfloat16() for name, weight in weights.items()})
    return folder, query


def _stage(folder, start, **keys):
    """A stage from this start, on a source without an instruction."""
    keys = {**NO_NEW_MODEL, "model": str(start), "eval_strategy": "no", "max_length": 128, **keys}
    keys = {"instructions": True, **keys}
    recipe, manifest = write_single_stage(folder, **keys), folder / "data/manifest.yaml"
    content = yaml.safe_load(manifest.read_text())
    for source in content["sources"]:
        del source["instruction"]
    manifest.write_text(yaml.safe_dump(content))
    return recipe


def _set_up(recipe):
    return set_up(load_recipe(recipe).stages[0])


def _texts(trainer, columns):
    source, tokenizer = trainer.sources[0], trainer.processing_class
    texts = source.rows["train"][:, columns].ravel().tolist()
    return [tokenizer.decode(source.tokens(text), skip_special_tokens=True) for text in texts]


def test_the_folder_saved_at_step_0_embeds_as_the_start(start, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder, query = start
    trainer = _set_up(_stage(tmp_path, folder))
    assert f"query prompt of the saved model: {query!r}" in caplog.text
    assert all(text.startswith(f"{query}the ") for text in _texts(trainer, 0))
    trainer.save_model(str(tmp_path / "saved"))
    # A plain folder says neither its pooling nor its prompts: what this repository reads from it is the start.
    plain = not (folder / "modules.json").exists()
    end = "<|im_end|>" if plain or query == OURS else "<|endoftext|>"
    line = f"appends nothing to a text; {end} is appended" if plain else f"appends {end} to a text, which stays"
    assert caplog.text.count(line) == 1
    models = [
        SentenceTransformer(str(each), device="cpu", model_kwargs={"dtype": torch.float32})
        for each in (tmp_path / "saved", *([] if plain else [folder]))
    ]
    assert models[0].tokenizer(["a"]).input_ids[0][-1] == models[0].tokenizer.convert_tokens_to_ids(end)
    document = "" if plain else models[1].prompts["document"]
    assert models[0].prompts["query"] == query and models[0].prompts["document"] == document
    assert all(text.startswith(document) for text in _texts(trainer, slice(1, None)))
    if plain:
        return
    assert models[0].prompts == models[1].prompts
    assert models[0].tokenizer.padding_side == models[1].tokenizer.padding_side
    for method in ("encode", "encode_query", "encode_document"):
        saved, expected = (getattr(model, method)(TEXTS) for model in models)
        assert np.array_equal(saved, expected), method
    assert not np.array_equal(models[0].encode_query(TEXTS), models[0].encode(TEXTS)) or query == ""


def test_told_otherwise_the_start_s_prompt_is_not_used(tmp_path, tiny_config, tiny_tokenizer):
    start = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer)
    for keys, prompt in (({"instructions": False}, ""), ({"query_instruction": "Turn it."}, instruct("Turn it."))):
        trainer = _set_up(_stage(tmp_path, start, **keys))
        assert trainer.prompts["query"] == prompt and all(
            text.startswith(f"{prompt}the ") for text in _texts(trainer, 0)
        )
        # Raw text needs no prompt, and says so in no file.
        described = PreparedSource(trainer.sources[0].folder).description
        assert described.get("prompt") == (prompt or None) and described["instruction"] is None


@pytest.mark.parametrize("trained", [False, True])
def test_a_prompt_before_documents_stays_if_a_source_is_trained_with_it(
    trained, tmp_path, tiny_config, tiny_tokenizer, caplog
):
    start = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer)
    edit_json(start / "config_sentence_transformers.json", default_prompt_name="query")
    recipe, manifest = _stage(tmp_path, start, task_types=None), tmp_path / "data/manifest.yaml"
    content = yaml.safe_load(manifest.read_text())
    for source in content["sources"][int(trained) :]:
        source["instruction"] = "Find it."
    manifest.write_text(yaml.safe_dump(content))
    trainer = _set_up(recipe)
    assert trainer.prompts["document"] == ("about: " if trained else "")
    assert ("puts 'about: ' before documents" in caplog.text) != trained
    assert "puts its prompt 'query' before texts encoded without one" in caplog.text
    assert all(text.startswith("about: ") == trained for text in _texts(trainer, 1))


def test_forms_and_sources_with_an_instruction_do_not_depend_on_the_start(tmp_path, tiny_config, tiny_tokenizer):
    start = save_like_qwen3_embedding(tmp_path / "start", tiny_config, tiny_tokenizer)
    forms, names = [], []
    for prompt, document in (("search for: ", "about: "), (QWEN3_PROMPTS["query"], "")):
        _set_prompts(start, {"query": prompt, "document": document})
        (source,) = _set_up(_stage(tmp_path, start, mask_duplicates=True)).sources
        forms.append(set(source.forms(np.arange(source.description["texts"])).tolist()))
        recipe = write_single_stage(tmp_path, **{**NO_NEW_MODEL, "model": str(start), "instructions": True})
        names.append(_set_up(recipe).sources[0].folder.name)
    assert forms[0] == forms[1] and names[0] == names[1]


def test_preparing_without_a_model_needs_an_instruction(tmp_path, tiny_tokenizer, capsys):
    _stage(tmp_path, "none")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["--manifest", tmp_path / "data/manifest.yaml", "--tokenizer", tmp_path / "tokenizer"]
    words = [str(word) for word in [*words, "--output", tmp_path / "out", "--sources", "tiny_classification"]]
    assert prepare_main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'tiny_classification' has no instruction" in line and "--raw" in line
    assert not (tmp_path / "out").exists()
    assert prepare_main([*words, "--raw"]) == 0
