"""Faults that servers, and older versions of the libraries, would meet."""

from __future__ import annotations

import pytest

from tests.training.publishing.broken import BrokenRelease

CONFIG = "config.json"


def test_a_base_of_rotary_embeddings_for_new_readers_alone(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, rope_theta=...)
    broken.expect((CONFIG, "rope_theta is None at the top", "transformers 4"))


def test_scaled_rotary_embeddings(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, lambda config: config["rope_parameters"].update(rope_type="linear", factor=2.0))
    broken.expect((CONFIG, "rope_type is 'linear'"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": ...}, "head_dim is None"),
    ],
)
def test_what_text_embeddings_inference_does_not_compute(broken: BrokenRelease, keys: dict, said: str) -> None:
    broken.edit(CONFIG, **keys)
    assert any(said in fault for fault in broken.faults())


def test_several_eos_tokens(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, eos_token_id=[1, 2])
    assert any("eos_token_id is [1, 2]: text-embeddings-inference" in fault for fault in broken.faults())


def test_modules_of_new_sentence_transformers_alone(broken: BrokenRelease) -> None:
    pooling = {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
    broken.edit("1_Pooling/config.json", lambda content: (content.clear(), content.update(pooling)))
    name = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    broken.edit("modules.json", lambda modules: modules[1].update(type=name))
    broken.edit("sentence_bert_config.json", lambda content: content.clear())
    broken.edit("tokenizer_config.json", additional_special_tokens=..., extra_special_tokens=["<|im_start|>"])
    broken.expect(
        ("1_Pooling/config.json", "lacks pooling_mode_cls_token"),
        ("modules.json", "llama.cpp"),
        ("sentence_bert_config.json", "lacks max_seq_length and do_lower_case"),
        ("tokenizer_config.json", "extra_special_tokens is a list"),
    )


def test_another_vocabulary_than_qwens_is_a_notice(broken: BrokenRelease) -> None:
    (notice,) = broken.examine().notices
    assert notice.file == "tokenizer.json" and "llama.cpp" in str(notice)
