"""Tokenizers of a recipe: trained ones repeat and cover every byte, loaded ones append EOS or are refused."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from modeling_f2llm.prompts import instruct
from tests.training.models.starts import edit_json
from training.models.loading import load_tokenizer, source_texts, train_tokenizer


@pytest.fixture
def saved(tmp_path, small_tokenizer):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    "text",
    ["größer", "東京 ответ שלום नमस्ते", "emoji \U0001f9ea and \u0000 bytes", " two  spaces ", "a\n\n\tb", "0123456789"],
)
def test_a_trained_tokenizer_round_trips_any_text(small_tokenizer, text):
    assert (small_tokenizer.eos_token, small_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids, start = small_tokenizer(text).input_ids, small_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids[-1] == small_tokenizer.eos_token_id and small_tokenizer.unk_token_id not in ids
    assert small_tokenizer.decode(ids[:-1]) == text
    assert small_tokenizer(f"<|im_start|>{text}").input_ids == [start, *ids]


@pytest.mark.parametrize("vocab_size", [259, 260, 300])
def test_training_repeats_and_gives_the_size_asked_for(vocab_size):
    texts = ["größer 東京 " + "".join(chr(97 + i * k % 26) for k in range(1, 9)) for i in range(200)]
    first, second = (train_tokenizer(iter(texts), vocab_size) for _ in range(2))
    assert len(first) == vocab_size and max(first.get_vocab().values()) == vocab_size - 1
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_saved_tokenizer_loads_unchanged(saved, small_tokenizer):
    loaded = load_tokenizer(str(saved))
    for text in ("", "größer 東京", instruct("Find.", "x")):
        assert loaded(text).input_ids == small_tokenizer(text).input_ids
    whole = loaded("river größer 東京 ответ").input_ids
    cut = loaded("river größer 東京 ответ", truncation=True, max_length=4).input_ids
    assert cut == [*whole[:3], loaded.eos_token_id]
    # EOS is appended where the tokenizer does not, and may pad.
    edit_json(saved / "tokenizer.json", post_processor=None)
    edit_json(saved / "tokenizer_config.json", pad_token="<|im_end|>")
    texts = ["river", "größer 東京"]
    batch = load_tokenizer(str(saved))(texts, padding=True)
    # The attention mask tells padding from the end of a text.
    for text, ids, mask in zip(texts, batch.input_ids, batch.attention_mask, strict=True):
        assert [token for token, kept in zip(ids, mask, strict=True) if kept] == small_tokenizer(text).input_ids


def test_tokenizers_without_eos_or_words_and_damaged_ones_are_refused(saved, refuses):
    edit_json(saved / "tokenizer_config.json", eos_token=None)
    with refuses(repr(str(saved)), "EOS"):
        load_tokenizer(str(saved))
    edit_json(saved / "tokenizer_config.json", eos_token="<|im_end|>")
    (saved / "tokenizer.json").unlink()
    with refuses(repr(str(saved)), "no token but special ones", "tokenizer.json"):
        load_tokenizer(str(saved))
    for content in ("", "{}", "[]"):
        (saved / "tokenizer.json").write_text(content)
        with refuses(repr(str(saved)), "cannot be used"):
            load_tokenizer(str(saved))
    with refuses("'/no/folder'", "cannot be used"):
        load_tokenizer("/no/folder")


def test_source_texts_are_what_the_model_reads(write_source, refuses):
    sources = [write_source("first", rows=6, negatives=(1, 2)), write_source("second", rows=3, negatives=0)]
    expected = []
    for source in sources:
        for path in source.files:
            table = pq.read_table(path).to_pydict()
            for query, passage in zip(table["query"], table["passage"], strict=True):
                expected += [instruct(source.instruction, query), passage]
    assert list(source_texts(sources)) == expected
    assert list(source_texts(sources[1:], every=2)) == [*expected[12:14], *expected[16:18]]
    sources[0].files[0].write_bytes(b"PAR1")
    with refuses(sources[0].files[0], "not a readable parquet file"):
        list(source_texts(sources))
