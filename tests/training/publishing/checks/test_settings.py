"""Faults of the settings: configuration, modules, prompts and tokenizer."""

from __future__ import annotations

import pytest

CONFIG, RECORD, MODULES, POOLING = "config.json", "release.json", "modules.json", "1_Pooling/config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCES, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
NEW_POOLING = {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
OTHER_END = {"eos_token": "<|im_start|>", "additional_special_tokens": ["<|im_end|>"]}
LINEAR = {"rope_type": "linear", "factor": 2.0}
NOWHERE = "sentence_transformers.models.nowhere.Normalize"


def keys(file, **changed):
    return lambda broken: broken.edit(file, **changed)


def change(file, function):
    return lambda broken: broken.edit(file, function)


def weights(function):
    return lambda broken: broken.edit_weights(function)


def template(tokenizer):
    processor = tokenizer["post_processor"]
    return next(each for each in processor.get("processors", [processor]) if each["type"] == "TemplateProcessing")


def single(tokenizer):
    return template(tokenizer)["single"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (keys(CONFIG, architectures=["Qwen3ForCausalLM"]), "config.json: architectures is ['Qwen3ForCausalLM'], not"),
        (keys(CONFIG, max_window_layers=28), "config.json: max_window_layers is 28, not 2"),
        (keys(CONFIG, is_matryoshka=...), "config.json: is_matryoshka is None, not True"),
        (keys(CONFIG, rope_theta=...), "config.json: does not have the form that older libraries"),
        (change(CONFIG, lambda each: each["rope_parameters"].update(LINEAR)), "config.json: rope_parameters is {"),
        (change(RECORD, lambda each: each["shape"].update(num_hidden_layers=3)), "release.json: shape is {"),
        (keys(TRANSFORMER, max_seq_length=7), "sentence_bert_config.json: does not have the form"),
        (keys(POOLING, word_embedding_dimension=64), f"{POOLING}: word_embedding_dimension is 64, not 32"),
        (keys(POOLING, include_prompt=False), f"{POOLING}: include_prompt is False, not True"),
        (change(MODULES, lambda modules: modules.pop()), "modules.json: does not normalise"),
        (
            change(MODULES, lambda modules: modules[2].update(type="x.Normalize")),
            "modules.json: does not have the form",
        ),
        (change(MODULES, lambda modules: modules[2].update(path="3_Normalize")), "the folder: it lacks 3_Normalize"),
        (keys(SENTENCES, prompts={}), "but the files give {}"),
        (keys(SENTENCES, default_prompt_name="query"), f"{SENTENCES}: default_prompt_name is 'query', not None"),
        (keys(SENTENCES, similarity_fn_name="dot"), f"{SENTENCES}: similarity_fn_name is 'dot', not 'cosine'"),
        (change(TOKENIZER, lambda each: single(each).append(single(each)[-1])), "tokenizer.json: appends EOS 2 times"),
        (
            change(TOKENIZER, lambda each: template(each)["pair"].pop(1)),
            "tokenizer.json: does not end each text of a pair with EOS",
        ),
        (keys(TOKENIZER_CONFIG, pad_token="<|im_end|>"), "config.json: pad_token_id is 0, but the tokenizer's is 1"),
        (keys(TOKENIZER_CONFIG, pad_token=...), f"{TOKENIZER_CONFIG}: names no padding token"),
        (keys(TOKENIZER_CONFIG, padding_side="left"), f"{TOKENIZER_CONFIG}: padding_side is 'left'"),
    ],
)
def test_a_fault(broken, edit, said):
    edit(broken)
    (fault,) = broken.faults()
    assert said in fault


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (keys(CONFIG, matryoshka_dimensions=[32, 8]), "config.json: matryoshka_dimensions is [32, 8], not [32, 16, 8]"),
        (keys(CONFIG, dtype="bfloat16"), "config.json: dtype is 'bfloat16', not 'float32'"),
        (keys(CONFIG, model_type="f2llm"), "config.json: model_type is 'f2llm', not 'qwen3'"),
        (keys(CONFIG, use_sliding_window=True), "config.json: use_sliding_window is True"),
        (keys(CONFIG, head_dim=...), "the configuration wants"),
        (keys(TOKENIZER_CONFIG, model_max_length=513), "sentence_bert_config.json: does not have the form"),
        (keys(POOLING, pooling_mode_mean_tokens=True), "modules.json: is pooled by"),
        (keys(CONFIG, eos_token_id=[1, 2]), "config.json: eos_token_id is [1, 2], but the tokenizer's is 1"),
        (keys(CONFIG, vocab_size=100), "but the model 100 embeddings"),
        (keys(TOKENIZER, post_processor=None), "tokenizer.json: appends EOS 0 times to a text, not once; "),
        (keys(TOKENIZER, model={"type": "nonsense"}), "tokenizer.json: is not a tokenizer"),
        (keys(TOKENIZER, normalizer={"type": "Lowercase"}), "library disagree on 'Where"),
        (keys(CONFIG, auto_map=...), "config.json: auto_map is None, not"),
        (keys(RECORD, max_length=7), "release.json: max_length is 7, but"),
        (weights(lambda all: all.pop("norm.weight")), "norm.weight is absent, the configuration wants (32,)"),
        (
            weights(lambda all: all.update({name: each.bfloat16() for name, each in all.items()})),
            "release.json: dtype is float32",
        ),
    ],
)
def test_a_fault_among_others(broken, edit, said):
    edit(broken)
    assert any(said in fault for fault in broken.faults()), broken.faults()


def test_settings_of_new_libraries_alone(broken):
    broken.edit(POOLING, lambda content: (content.clear(), content.update(NEW_POOLING)))
    name = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    broken.edit(MODULES, lambda modules: modules[1].update(type=name))
    broken.edit(TRANSFORMER, lambda content: content.clear())
    broken.edit(TOKENIZER_CONFIG, additional_special_tokens=..., extra_special_tokens=["<|im_start|>"])
    faults = broken.faults()
    assert {fault.partition(":")[0] for fault in faults} == {POOLING, MODULES, TRANSFORMER, TOKENIZER_CONFIG}


def test_texts_may_end_with_another_token_than_eos(broken):
    """As those of a model that was started from Qwen3-Embedding."""
    broken.edit(TOKENIZER_CONFIG, **OTHER_END)
    assert not [fault for fault in broken.faults() if "EOS" in fault or "eos_token_id" in fault]
    broken.edit(CONFIG, eos_token_id=0)
    assert any("eos_token_id is 0, but the tokenizer's is 2" in fault for fault in broken.faults())


def test_padding_with_eos_and_another_vocabulary_are_no_fault(broken):
    broken.edit(TOKENIZER_CONFIG, pad_token="<|im_end|>")
    broken.edit(CONFIG, pad_token_id=1)
    broken.expect()
    (notice,) = broken.examine().notices
    assert notice.file == TOKENIZER and "llama.cpp" in str(notice)
