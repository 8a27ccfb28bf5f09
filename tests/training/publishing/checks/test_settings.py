"""Faults of the settings: configuration, modules, prompts and tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.training.publishing.broken import BrokenRelease

CONFIG, RECORD, MODULES, POOLING = "config.json", "release.json", "modules.json", "1_Pooling/config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCES, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
NEW_POOLING = {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
OTHER_END = {"eos_token": "<|im_start|>", "additional_special_tokens": ["<|im_end|>"]}


def keys(file: str, **changed: Any) -> Callable[[BrokenRelease], None]:
    return lambda broken: broken.edit(file, **changed)


def change(file: str, function: Callable[[Any], Any]) -> Callable[[BrokenRelease], None]:
    return lambda broken: broken.edit(file, function)


def template(tokenizer: dict[str, Any]) -> dict[str, Any]:
    processor = tokenizer["post_processor"]
    return next(each for each in processor.get("processors", [processor]) if each["type"] == "TemplateProcessing")


@pytest.mark.parametrize(
    ("edit", "file", "said"),
    [
        (keys(CONFIG, architectures=["Qwen3ForCausalLM"]), CONFIG, "['Qwen3ForCausalLM'], not ['Qwen3Model']"),
        (keys(CONFIG, max_window_layers=28), CONFIG, "max_window_layers 28 is more than the 2 layers"),
        (keys(CONFIG, is_matryoshka=...), CONFIG, "is_matryoshka is None, not True (vLLM refuses"),
        (keys(CONFIG, matryoshka_dimensions=...), CONFIG, "matryoshka_dimensions is None, not [32, 16, 8]"),
        (keys(CONFIG, matryoshka_dimensions=[16, 32, 8]), CONFIG, "is [16, 32, 8], not [32, 16, 8]"),
        (keys(CONFIG, matryoshka_dimensions=[32, 8]), CONFIG, "is [32, 8], not [32, 16, 8]"),
        (keys(CONFIG, dtype="bfloat16"), CONFIG, "dtype is 'bfloat16', not 'float32'"),
        (keys(CONFIG, rope_theta=...), CONFIG, "rope_theta is None, not 10000.0 (transformers 4"),
        (
            change(CONFIG, lambda config: config["rope_parameters"].update(rope_type="linear", factor=2.0)),
            *(CONFIG, "the type 'default' only"),
        ),
        (
            change(RECORD, lambda record: record["shape"].update(num_hidden_layers=3)),
            *(CONFIG, "num_hidden_layers is 2, not 3"),
        ),
        (keys(TOKENIZER_CONFIG, model_max_length=513), TOKENIZER_CONFIG, "model_max_length is 513, not "),
        (keys(TRANSFORMER, max_seq_length=7), TRANSFORMER, "max_seq_length is 7, not "),
        (keys(TRANSFORMER, do_lower_case=...), TRANSFORMER, "do_lower_case is None, not False"),
        (keys(POOLING, word_embedding_dimension=64), POOLING, "word_embedding_dimension is 64, not 32"),
        (keys(POOLING, pooling_mode_mean_tokens=True), POOLING, "pooling_mode_mean_tokens is True, not False"),
        (keys(POOLING, include_prompt=False), POOLING, "include_prompt is False, not True"),
        (change(MODULES, lambda modules: modules.pop()), MODULES, "Pooling, not sentence_transformers.models.Transf"),
        (
            change(MODULES, lambda modules: modules[0].update(type="modeling_f2llm.Transformer")),
            *(MODULES, "the modules are modeling_f2llm.Transformer,"),
        ),
        (
            change(MODULES, lambda modules: modules[2].update(type="sentence_transformers.models.nowhere.Normalize")),
            *(MODULES, "models.nowhere.Normalize, not"),
        ),
        (
            change(MODULES, lambda modules: modules[2].update(path="3_Normalize")),
            *(MODULES, "there is no folder 3_Normalize"),
        ),
        (keys(SENTENCES, prompts={}), SENTENCES, "prompts is {}, not {'query'"),
        (keys(RECORD, prompts={"query": "query: ", "document": ""}), SENTENCES, "not {'query': 'query: '"),
        (keys(SENTENCES, default_prompt_name="query"), SENTENCES, "default_prompt_name is 'query', not None"),
        (keys(SENTENCES, similarity_fn_name="dot"), SENTENCES, "similarity_fn_name is 'dot', not 'cosine'"),
        (
            change(TOKENIZER, lambda each: template(each)["single"].append(template(each)["single"][-1])),
            *(TOKENIZER, "appends EOS 2 times"),
        ),
        (
            change(TOKENIZER, lambda each: template(each)["pair"].pop(1)),
            *(TOKENIZER, "does not end each text of a pair with EOS"),
        ),
        (keys(TOKENIZER_CONFIG, pad_token="<|im_end|>"), CONFIG, "pad_token_id is 0, but the tokenizer's is 1"),
        (keys(TOKENIZER_CONFIG, pad_token=...), TOKENIZER_CONFIG, "names no padding token"),
        (keys(TOKENIZER_CONFIG, padding_side="left"), TOKENIZER_CONFIG, "padding_side is 'left'"),
        (keys(TOKENIZER_CONFIG, truncation_side="left"), TOKENIZER_CONFIG, "truncation_side is 'left'"),
    ],
)
def test_a_fault(broken: BrokenRelease, edit: Callable[[BrokenRelease], None], file: str, said: str) -> None:
    edit(broken)
    broken.expect((file, said))


@pytest.mark.parametrize(
    ("edit", "file", "said"),
    [
        (keys(CONFIG, model_type="f2llm"), CONFIG, "model_type is 'f2llm', not 'qwen3'"),
        (change(CONFIG, lambda config: config["layer_types"].append("full_attention")), CONFIG, "Qwen3Config refuses"),
        (change(CONFIG, lambda config: config["layer_types"].append("full_attention")), CONFIG, "one for each layer"),
        (keys(CONFIG, matryoshka_dimensions=[64, 32, 16, 8]), CONFIG, "do not fit a model of hidden_size 32"),
        (keys(CONFIG, use_sliding_window=True), CONFIG, "use_sliding_window is True"),
        (keys(CONFIG, hidden_act="gelu"), CONFIG, "hidden_act is 'gelu'"),
        (keys(CONFIG, head_dim=...), CONFIG, "head_dim is None"),
        (keys(CONFIG, eos_token_id=[1, 2]), CONFIG, "eos_token_id is [1, 2], but the tokenizer's is 1"),
        (keys(CONFIG, vocab_size=100), TOKENIZER, "but the model 100 embeddings"),
        (keys(TOKENIZER, post_processor=None), TOKENIZER, "appends EOS 0 times to a text, not once; "),
        (keys(TOKENIZER, model={"type": "nonsense"}), TOKENIZER, "is not a tokenizer"),
        (keys(TOKENIZER, normalizer={"type": "Lowercase"}), TOKENIZER_CONFIG, "library disagree on 'Where"),
    ],
)
def test_a_fault_among_others(broken: BrokenRelease, edit: Any, file: str, said: str) -> None:
    edit(broken)
    assert any(fault.startswith(f"{file}: ") and said in fault for fault in broken.faults()), broken.faults()


def test_settings_of_new_libraries_alone(broken: BrokenRelease) -> None:
    broken.edit(POOLING, lambda content: (content.clear(), content.update(NEW_POOLING)))
    name = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    broken.edit(MODULES, lambda modules: modules[1].update(type=name))
    broken.edit(TRANSFORMER, lambda content: content.clear())
    broken.edit(TOKENIZER_CONFIG, additional_special_tokens=..., extra_special_tokens=["<|im_start|>"])
    faults = broken.faults()
    assert {fault.partition(":")[0] for fault in faults} == {POOLING, MODULES, TRANSFORMER, TOKENIZER_CONFIG}
    for said in ("pooling_mode_lasttoken is None", "before 5.4 and llama.cpp", "max_seq_length is None", "is a list"):
        assert any(said in fault for fault in faults), (said, faults)


def test_texts_may_end_with_another_token_than_eos(broken: BrokenRelease) -> None:
    """As those of a model that was started from Qwen3-Embedding."""
    broken.edit(TOKENIZER_CONFIG, **OTHER_END)
    assert not [fault for fault in broken.faults() if "EOS" in fault or "eos_token_id" in fault]
    broken.edit(CONFIG, eos_token_id=0)
    assert any("eos_token_id is 0, but the tokenizer's is 2" in fault for fault in broken.faults())


def test_padding_with_eos(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER_CONFIG, pad_token="<|im_end|>")
    broken.edit(CONFIG, pad_token_id=1)
    broken.expect()


def test_another_vocabulary_than_qwens_is_a_notice(broken: BrokenRelease) -> None:
    (notice,) = broken.examine().notices
    assert notice.file == TOKENIZER and "llama.cpp" in str(notice)
