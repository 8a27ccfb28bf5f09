"""Tokenizers of a recipe: trained ones repeat and cover every byte, loaded ones append EOS or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.prompts import instruct
from training.data.manifest import Source
from training.models.tokenizer import load_tokenizer, source_texts, train_tokenizer

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def saved(tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase) -> Path:
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def configure(folder: Path, **settings: str | None) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    "text",
    [
        "river",
        "größer",
        "東京 ответ שלום नमस्ते",
        "emoji \U0001f9ea and \u0000 bytes",
        " two  spaces ",
        "a\n\n\tb",
        "0123456789",
    ],
)
def test_trained_tokenizer_round_trips_any_text(small_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = small_tokenizer(text).input_ids
    assert ids[-1] == small_tokenizer.eos_token_id
    assert small_tokenizer.unk_token_id not in ids
    assert small_tokenizer.decode(ids[:-1]) == text


def test_trained_tokenizer_has_the_special_tokens_of_qwen(small_tokenizer: PreTrainedTokenizerBase) -> None:
    assert small_tokenizer.eos_token == "<|im_end|>"
    assert small_tokenizer.pad_token == "<|endoftext|>"
    assert small_tokenizer.convert_tokens_to_ids("<|im_start|>") is not None
    assert small_tokenizer("<|im_start|>").input_ids == [
        small_tokenizer.convert_tokens_to_ids("<|im_start|>"),
        small_tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize("vocab_size", [259, 260, 300])
def test_vocabulary_has_the_size_asked_for(vocab_size: int) -> None:
    texts = ["".join(chr(97 + i * k % 26) for k in range(1, 9)) for i in range(200)]
    tokenizer = train_tokenizer(iter(texts), vocab_size)
    assert len(tokenizer) == vocab_size
    assert max(tokenizer.get_vocab().values()) == vocab_size - 1


def test_training_repeats() -> None:
    texts = [f"number {i} größer 東京 {i * i}" for i in range(200)]
    first, second = (train_tokenizer(iter(texts), 350).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_saved_tokenizer_loads_as_it_was(saved: Path, small_tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = load_tokenizer(str(saved))
    for text in ("", "größer 東京", instruct("Find.", "x")):
        assert loaded(text).input_ids == small_tokenizer(text).input_ids
        assert loaded(text).input_ids.count(loaded.eos_token_id) == 1


def test_loaded_tokenizer_keeps_eos_when_it_truncates(saved: Path) -> None:
    loaded = load_tokenizer(str(saved))
    whole = loaded("river größer 東京 ответ").input_ids
    assert loaded("river größer 東京 ответ", truncation=True, max_length=4).input_ids == [
        *whole[:3],
        loaded.eos_token_id,
    ]


def test_eos_is_appended_where_the_tokenizer_does_not(saved: Path) -> None:
    path = saved / "tokenizer.json"
    backend = json.loads(path.read_text())
    backend["post_processor"] = None
    path.write_text(json.dumps(backend))
    loaded = load_tokenizer(str(saved))
    assert loaded("river").input_ids[-1] == loaded.eos_token_id


def test_loaded_tokenizer_has_no_eos(saved: Path, refuses: Refuses) -> None:
    configure(saved, eos_token=None)
    with refuses(repr(str(saved)), "EOS"):
        load_tokenizer(str(saved))


def test_loaded_tokenizer_pads_with_eos(saved: Path, small_tokenizer: PreTrainedTokenizerBase) -> None:
    """The attention mask tells padding from the end of a text."""
    configure(saved, pad_token="<|im_end|>")
    loaded = load_tokenizer(str(saved))
    batch = loaded(["river", "größer 東京"], padding=True)
    for text, ids, mask in zip(["river", "größer 東京"], batch.input_ids, batch.attention_mask, strict=True):
        assert [token for token, kept in zip(ids, mask, strict=True) if kept] == small_tokenizer(text).input_ids


def test_loaded_tokenizer_has_no_words(saved: Path, refuses: Refuses) -> None:
    (saved / "tokenizer.json").unlink()
    with refuses(repr(str(saved)), "no token but special ones", "tokenizer.json"):
        load_tokenizer(str(saved))


def test_folder_without_a_tokenizer(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(repr(str(tmp_path)), "cannot be used"):
        load_tokenizer(str(tmp_path))


def test_missing_folder(tmp_path: Path, refuses: Refuses) -> None:
    with refuses(repr(str(tmp_path / "none")), "cannot be used"):
        load_tokenizer(str(tmp_path / "none"))


@pytest.mark.parametrize("content", ["", "not json", "{}", "[]"])
def test_damaged_tokenizer(saved: Path, refuses: Refuses, content: str) -> None:
    (saved / "tokenizer.json").write_text(content)
    with refuses(repr(str(saved)), "cannot be used"):
        load_tokenizer(str(saved))


def test_source_texts_are_what_the_model_reads(write_source: Callable[..., Source]) -> None:
    sources = [write_source("first", rows=6, negatives=(1, 2)), write_source("second", rows=3, negatives=0)]
    expected = []
    for source in sources:
        for path in source.files:
            table = pq.read_table(path).to_pydict()
            for query, passage in zip(table["query"], table["passage"], strict=True):
                expected += [instruct(source.instruction, query), passage]
    assert list(source_texts(sources)) == expected


def test_source_texts_of_every_other_row(write_source: Callable[..., Source]) -> None:
    source = write_source(rows=7)
    texts = list(source_texts([source]))
    pairs = [texts[i : i + 2] for i in range(0, 14, 2)]
    assert list(source_texts([source], every=3)) == pairs[0] + pairs[3] + pairs[6]


def test_source_texts_name_the_fault(write_source: Callable[..., Source], refuses: Refuses) -> None:
    source = write_source()
    source.files[0].write_bytes(b"PAR1")
    with refuses(source.files[0], "not a readable parquet file"):
        list(source_texts([source]))
