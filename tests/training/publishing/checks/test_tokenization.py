"""Faults of the tokenizer."""

from __future__ import annotations

from typing import Any

from tests.training.publishing.broken import BrokenRelease

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def _template(tokenizer: dict[str, Any]) -> dict[str, Any]:
    processor = tokenizer["post_processor"]
    return next(each for each in processor.get("processors", [processor]) if each["type"] == "TemplateProcessing")


def test_no_eos(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER, post_processor=None)
    faults = broken.faults()
    assert faults[0].startswith("tokenizer.json: appends EOS 0 times to a text, not once; ")
    assert len([fault for fault in faults if not fault.startswith("tokenizer.json: ")]) == 0


def test_eos_twice(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER, lambda each: _template(each)["single"].append(_template(each)["single"][-1]))
    broken.expect((TOKENIZER, "appends EOS 2 times"))


def test_one_eos_for_a_pair(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER, lambda each: _template(each)["pair"].pop(1))
    broken.expect((TOKENIZER, "does not end each text of a pair with EOS"))


def test_texts_may_end_with_another_token_than_eos(broken: BrokenRelease) -> None:
    """As those of a model that was started from Qwen3-Embedding."""
    broken.edit(TOKENIZER_CONFIG, eos_token="<|im_start|>", additional_special_tokens=["<|im_end|>"])
    assert not [fault for fault in broken.faults() if "EOS" in fault or "eos_token_id" in fault]


def test_another_token_for_eos(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER_CONFIG, eos_token="<|im_start|>", additional_special_tokens=["<|im_end|>"])
    broken.edit("config.json", eos_token_id=0)
    faults = broken.faults()
    assert any(fault.startswith("config.json: eos_token_id is 0, but the tokenizer's is 2") for fault in faults)


def test_padding_with_eos(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER_CONFIG, pad_token="<|im_end|>")
    broken.expect(("config.json", "pad_token_id is 0, but the tokenizer's is 1"))
    broken.edit("config.json", pad_token_id=1)
    assert not broken.faults()


def test_no_padding(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER_CONFIG, pad_token=...)
    broken.expect((TOKENIZER_CONFIG, "names no padding token"))


def test_padding_and_truncation_on_the_left(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER_CONFIG, padding_side="left", truncation_side="left")
    broken.expect((TOKENIZER_CONFIG, "padding_side"), (TOKENIZER_CONFIG, "truncation_side"))


def test_files_of_two_tokenizers(broken: BrokenRelease) -> None:
    broken.edit(TOKENIZER, lambda each: each.update(normalizer={"type": "Lowercase"}))
    faults = broken.faults()
    assert not faults or all("disagree" in fault for fault in faults)


def test_more_tokens_than_embeddings(broken: BrokenRelease) -> None:
    broken.edit("config.json", vocab_size=100)
    faults = broken.faults()
    assert any("but the model 100 embeddings" in fault for fault in faults)


def test_no_tokenizer_at_all(broken: BrokenRelease) -> None:
    broken.write(TOKENIZER, '{"version": "1.0", "model": {"type": "nonsense"}}')
    faults = broken.faults()
    assert any(fault.startswith("tokenizer.json: is no tokenizer") and "tokenizer" in fault for fault in faults)
