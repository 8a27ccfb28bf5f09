"""append_eos: the tokenizer itself ends every text with EOS, here and in every runtime that reads tokenizer.json."""

from __future__ import annotations

from copy import deepcopy

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, Qwen2Tokenizer

from modeling_f2llm import append_eos
from modeling_f2llm.tokenizer import end_token_id

# In NFC, to which Qwen's tokenizer normalises.
MULTILINGUAL = [
    "Façade, naïve – “quoted” … 100 %\n\n\ttab",
    "敏捷的棕色狐狸跳过了懒狗。",
    "กาลครั้งหนึ่งนานมาแล้ว",
    "ཨོཾ་མ་ཎི་པདྨེ་ཧཱུྃ",
    "🐼🏽‍🚀 🇨🇳",
    "  spaces  around  ",
    "ⵜⴰⵎⴰⵣⵉⵖⵜ ߒߞߏ ᏣᎳᎩ",
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return deepcopy(tiny_tokenizer)


@pytest.fixture
def blank():
    """A tokenizer that does not append EOS yet."""
    tokenizer = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return tokenizer.train_new_from_iterator(["some text"], vocab_size=270, show_progress=False)


def test_eos_follows_the_text_and_nothing_else_changes(blank):
    texts = ["some text", "", *MULTILINGUAL]
    before = blank(texts).input_ids
    blank.padding_side = blank.truncation_side = "left"
    assert end_token_id(blank) is None
    assert append_eos(append_eos(blank)) is blank and end_token_id(blank) == blank.eos_token_id
    assert (blank.padding_side, blank.truncation_side) == ("right", "right")
    assert blank(texts).input_ids == [[*ids, blank.eos_token_id] for ids in before]
    assert blank("some text", add_special_tokens=False).input_ids == before[0]
    assert blank("some", "text").input_ids == blank("some").input_ids + blank("text").input_ids
    batch = blank(texts, padding=True)
    for ids, mask, text in zip(batch.input_ids, batch.attention_mask, before, strict=True):
        assert ids == [*text, blank.eos_token_id, *[blank.pad_token_id] * (len(ids) - sum(mask))]
    blank.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        append_eos(blank)
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        append_eos(ByT5Tokenizer())


@pytest.mark.parametrize("post_processor", [None, ByteLevel(trim_offsets=False)], ids=["none", "byte-level"])
def test_offsets_still_point_into_the_text(blank, post_processor):
    blank.backend_tokenizer.post_processor = post_processor
    text = " some  text"
    before = blank(text, return_offsets_mapping=True)
    after = append_eos(blank)(text, return_offsets_mapping=True)
    assert after.input_ids == [*before.input_ids, blank.eos_token_id]
    assert after.offset_mapping[:-1] == before.offset_mapping
    assert "".join(text[start:end] for start, end in after.offset_mapping) == text


@pytest.mark.parametrize("max_length", [1, 2, 8])
def test_eos_is_kept_on_truncation(tokenizer, max_length):
    text = "Giant pandas live in the mountain forests of Sichuan."
    whole = tokenizer(text).input_ids
    short = tokenizer(text, truncation=True, max_length=max_length).input_ids
    assert short == [*whole[: max_length - 1], tokenizer.eos_token_id]


@pytest.mark.parametrize("appended", ["<|endoftext|>", "<|im_start|>"])
def test_a_token_that_is_appended_already_stays(blank, appended):
    """Qwen3-Embedding's EOS is <|im_end|>, but its padding token follows every text."""
    blank.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    token = blank.convert_tokens_to_ids(appended)
    template = TemplateProcessing(single=f"$A {appended}:0", special_tokens=[(appended, token)])
    blank.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    assert end_token_id(blank) == token
    append_eos(blank)
    assert end_token_id(blank) == token
    for text in ("", *MULTILINGUAL):
        assert blank(text).input_ids == [*blank(text, add_special_tokens=False).input_ids, token]
    assert blank(MULTILINGUAL[0], truncation=True, max_length=4).input_ids[-1] == token


def test_saved_tokenizer_appends_eos_in_stock_libraries(tokenizer, sentences, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer(sentences).input_ids
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(sentences).input_ids == expected
    assert loaded.padding_side == "right"
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # Older versions of transformers save the padding of the last call.
    bare.no_padding()
    assert [encoding.ids for encoding in bare.encode_batch(sentences)] == expected


@pytest.mark.parametrize("pad_token", ["<|im_end|>", None])
def test_eos_may_be_the_padding_and_is_where_there_is_none(blank, pad_token):
    blank.pad_token = pad_token
    append_eos(blank)
    assert blank.pad_token == "<|im_end|>"
    batch = blank(["some text", "a"], padding=True)
    lengths = [sum(mask) for mask in batch.attention_mask]
    assert [ids[length - 1] for ids, length in zip(batch.input_ids, lengths, strict=True)] == [blank.eos_token_id] * 2


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("first", [["<s>"], ["<s>", "<t>"]])
def test_what_goes_before_a_text_stays(first, byte_level, tmp_path):
    """Llama's tokenizer puts BOS before every text and nothing after it."""
    blank = Qwen2Tokenizer(eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<s>", "<t>"])
    blank = blank.train_new_from_iterator(["some text"], vocab_size=270, show_progress=False)
    ids = blank.convert_tokens_to_ids(first)
    template = TemplateProcessing(single=[*first, "$A"], special_tokens=list(zip(first, ids, strict=True)))
    parts = [ByteLevel(trim_offsets=False), template]
    blank.backend_tokenizer.post_processor = Sequence(parts) if byte_level else template
    before = blank("some text", return_offsets_mapping=True)
    append_eos(blank)
    after = blank("some text", return_offsets_mapping=True)
    assert after.input_ids == [*before.input_ids, blank.eos_token_id]
    assert after.offset_mapping[:-1] == before.offset_mapping
    assert isinstance(blank.backend_tokenizer.post_processor, Sequence) is byte_level
    assert blank("some", "text").input_ids == blank("some").input_ids + blank("text").input_ids
    short = blank("some text", truncation=True, max_length=len(ids) + 2).input_ids
    assert (short[: len(ids)], short[-1]) == (ids, blank.eos_token_id)
    blank.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("some text").input_ids == after.input_ids


def test_a_class_that_writes_its_own_template_keeps_both_ends(tmp_path):
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b"])}
    tokenizer = append_eos(LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True))
    assert tokenizer("ab").input_ids == [1, 3, 4, 5, 2]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == [1, 3, 4, 5, 2]
