"""A trimmed vocabulary: the same pieces where they survive, no text lost, embeddings equal to the last bit."""

from __future__ import annotations

import json
import random
import unicodedata
from copy import deepcopy

import numpy as np
import pytest
import torch
from babel import localedata
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_f2llm import append_eos, build_sentence_transformer
from tests.training.pruning.pruned_models import make_model
from training.models.loading import train_tokenizer
from training.pruning.vocabulary import trim_vocabulary

ROWS = 2048
# Whose names the trimmed vocabulary is for.
KEPT_LANGUAGES = ("de", "en", "hi", "ru", "zh")
EMOJI = ["👩‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪", "naïve café\u0301", "1️⃣ №", "👍🏽", "\u200f‎mixed ‏שלום\u200e"]
WHITESPACE = ["", " ", "\n\n \t", "a  b\r\n c ", "\u00a0\u3000x", "def f(x):\n    return x\n", "\x00\x7f\ufffd"]


@pytest.fixture(scope="module")
def names():
    """Names of territories and languages by language, as Unicode CLDR has them."""
    found = {}
    for locale in localedata.locale_identifiers():
        if "_" in locale:  # a territory or script of a language that is there itself
            continue
        data = localedata.load(locale)
        each = [*data.get("territories", {}).values(), *data.get("languages", {}).values()]
        found[locale] = [name for name in each if isinstance(name, str)]
    return {locale: each for locale, each in found.items() if len(each) >= 10}


@pytest.fixture(scope="module")
def tokenizer(names):
    return train_tokenizer((name for each in names.values() for name in each[::8]), 2000)


@pytest.fixture(scope="module")
def whole():
    return make_model(vocab_size=ROWS)


@pytest.fixture(scope="module")
def kept_texts(names):
    return [name for locale in KEPT_LANGUAGES for name in names[locale][::3]]


@pytest.fixture(scope="module")
def trimmed(whole, tokenizer, kept_texts):
    """Model, tokenizer and report."""
    used = {token for ids in tokenizer(kept_texts)["input_ids"] for token in ids}
    return trim_vocabulary(whole, tokenizer, used)


@pytest.fixture(scope="module")
def all_texts(names):
    """Names in more than 200 languages, emoji, whitespace, and any characters that Unicode may ever assign."""
    rng = random.Random(0)
    characters = [chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000]
    drawn = ["".join(rng.choices(characters, k=rng.randrange(1, 30))) for _ in range(500)]
    return [name for each in names.values() for name in each[::6]] + EMOJI + WHITESPACE + drawn


def _model_and_tokenizer(description: dict):
    """A model and a tokenizer of a description made by hand."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    return make_model(vocab_size=ROWS), append_eos(tokenizer)


@pytest.fixture
def description(tokenizer):
    """The content of ``tokenizer.json``, to be changed."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _embed(model, tokenizer, texts):
    ids = tokenizer(texts)["input_ids"]
    flat = torch.tensor([token for each in ids for token in each])[None]
    with torch.no_grad():
        return model(input_ids=flat, sequence_lengths=[len(each) for each in ids]).last_hidden_state


def test_no_text_is_lost(trimmed, all_texts, names):
    assert len(names) > 200
    backend = trimmed[1].backend_tokenizer
    for text, encoded in zip(all_texts, backend.encode_batch(all_texts, add_special_tokens=False), strict=True):
        # The tokenizer reads NFC, trimmed or not.
        assert backend.decode(encoded.ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_pieces_that_survive_are_the_same(tokenizer, trimmed, all_texts, kept_texts, names):
    known = trimmed[1].get_vocab()
    survived = 0
    for text in [*all_texts, *kept_texts]:
        before = tokenizer.tokenize(text)
        if known.keys() >= set(before):
            survived += 1
            assert trimmed[1].tokenize(text) == before, text
    assert len(kept_texts) < survived < len(all_texts)
    # Other texts take more tokens.
    other = names["am"]
    assert sum(map(len, tokenizer(other)["input_ids"])) < sum(map(len, trimmed[1](other)["input_ids"]))


def test_embeddings_of_kept_texts_are_the_same_to_the_last_bit(whole, tokenizer, trimmed, kept_texts):
    model, smaller, _ = trimmed
    texts = kept_texts[:200]
    assert torch.equal(_embed(model, smaller, texts), _embed(whole, tokenizer, texts))
    # Piece by piece: each has the row it had.
    before, table = tokenizer.get_vocab(), whole.embed_tokens.weight
    for token, number in smaller.get_vocab().items():
        assert torch.equal(model.embed_tokens.weight[number], table[before[token]]), token


def test_new_ids_keep_the_old_order_and_leave_no_gap(tokenizer, trimmed):
    before, after = tokenizer.get_vocab(), trimmed[1].get_vocab()
    assert sorted(after.values()) == list(range(trimmed[0].config.vocab_size))
    assert sorted(after, key=after.get) == sorted(after, key=before.get)
    assert {*tokenizer.all_special_tokens} == {*trimmed[1].all_special_tokens}
    for name in ("eos_token", "pad_token", "padding_side", "truncation_side", "model_max_length"):
        assert getattr(trimmed[1], name) == getattr(tokenizer, name), name


def test_special_tokens_move_in_configuration_and_post_processor(names):
    # Special tokens with the highest ids, as Qwen has them: all of them move.
    texts = (name for each in names.values() for name in each[::16])
    tokenizer = train_tokenizer(texts, 600)
    ids = {token: number for number, token in enumerate([*_ordinary(tokenizer), *tokenizer.all_special_tokens])}
    tokenizer = _reordered(tokenizer, ids)
    eos, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    assert min(eos, pad) >= 597
    model = make_model(vocab_size=ROWS, eos_token_id=[eos, pad], pad_token_id=pad, bos_token_id=ROWS - 1)
    smaller, trimmed, _ = trim_vocabulary(model, tokenizer, tokenizer("the red river")["input_ids"])
    assert trimmed.eos_token_id < eos
    assert smaller.config.eos_token_id == [trimmed.eos_token_id, trimmed.pad_token_id]
    assert smaller.config.pad_token_id == trimmed.pad_token_id
    assert smaller.config.bos_token_id is None  # no token has that id
    assert trimmed("the red river")["input_ids"][-1] == trimmed.eos_token_id
    assert trimmed("a", "b")["input_ids"].count(trimmed.eos_token_id) == 2
    assert trimmed("x<|im_start|>y")["input_ids"][1] == trimmed.get_vocab()["<|im_start|>"]


def _ordinary(tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return [token for token in sorted(vocab, key=vocab.get) if token not in tokenizer.all_special_tokens]


def _reordered(tokenizer, ids: dict[str, int]):
    """The tokenizer with other ids."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = description["model"]["vocab"]
    description["model"]["vocab"] = {token: ids[token] for token in sorted(vocab, key=ids.get)}
    for each in description["added_tokens"]:
        each["id"] = ids[each["content"]]
    description["post_processor"] = None
    return _model_and_tokenizer(description)[1]


def test_the_report_counts_what_is_there(whole, tokenizer, trimmed):
    model, smaller, report = trimmed
    width = model.config.hidden_size
    assert (report.tokens_before, report.tokens_after) == (len(tokenizer), len(smaller))
    assert (report.embeddings_before, report.embeddings_after) == (ROWS * width, len(smaller) * width)
    assert (report.parameters_before, report.parameters_after) == (whole.num_parameters(), model.num_parameters())
    assert report.bytes_after == 4 * report.parameters_after
    assert report.merges_after < report.merges_before
    assert f"{len(tokenizer):,} -> {len(smaller):,} tokens" in str(report)


def test_what_was_given_is_not_changed(tokenizer, kept_texts):
    model = make_model(vocab_size=ROWS)
    state, config, backend = deepcopy(model.state_dict()), model.config.to_dict(), tokenizer.backend_tokenizer.to_str()
    smaller, _, _ = trim_vocabulary(model, tokenizer, tokenizer(kept_texts[0])["input_ids"])
    for weight in smaller.parameters():
        weight.data.zero_()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert model.config.to_dict() == config and tokenizer.backend_tokenizer.to_str() == backend


def test_nothing_but_rows_without_a_token_is_trimmed_where_all_are_used(whole, tokenizer, all_texts):
    model, same, report = trim_vocabulary(whole, tokenizer, range(len(tokenizer)))
    assert same.get_vocab() == tokenizer.get_vocab() and report.merges_after == report.merges_before
    assert torch.equal(model.embed_tokens.weight, whole.embed_tokens.weight[: len(tokenizer)])
    assert same(all_texts)["input_ids"] == tokenizer(all_texts)["input_ids"]


def test_without_a_text_bytes_and_special_tokens_are_left(whole, tokenizer, all_texts):
    _, least, report = trim_vocabulary(whole, tokenizer, [])
    assert report.tokens_after == 256 + len(tokenizer.all_special_tokens) and report.merges_after == 0
    assert [len(ids) for ids in least(EMOJI)["input_ids"]] == [
        len(unicodedata.normalize("NFC", text).encode()) + 1 for text in EMOJI
    ]


def test_padding_and_truncation_of_a_call_do_not_stay(whole, tokenizer, kept_texts):
    changed = deepcopy(tokenizer)
    changed(kept_texts[:4], padding=True, truncation=True, max_length=4)
    assert changed.backend_tokenizer.padding and changed.backend_tokenizer.truncation
    _, trimmed, _ = trim_vocabulary(whole, changed, range(len(tokenizer)))
    # Runtimes that read tokenizer.json alone would pad and truncate too.
    assert trimmed.backend_tokenizer.padding is None and trimmed.backend_tokenizer.truncation is None


@pytest.mark.parametrize("text", ["abc", "xabc", "abcabc", "bc", "ab"])
def test_a_token_that_two_merges_make_keeps_the_parts_of_both(description, text):
    vocab = {"<|endoftext|>": 0, "<|im_end|>": 1}
    bytes_ = [token for token in description["model"]["vocab"] if len(token) == 1]
    for token in (*bytes_, "bc", "ab", "xa", "abc", "abcd"):
        vocab[token] = len(vocab)
    # "bc" goes before "ab", so only the last but one ever makes "abc"; which one does is not ours to say.
    merges = [["b", "c"], ["a", "b"], ["x", "a"], ["ab", "c"], ["a", "bc"], ["abc", "d"]]
    description["model"] |= {"vocab": vocab, "merges": merges}
    description["added_tokens"] = [each for each in description["added_tokens"] if each["id"] < 2]
    model, tokenizer = _model_and_tokenizer(description)
    smaller, trimmed, report = trim_vocabulary(model, tokenizer, [vocab["abc"]])
    assert trimmed.get_vocab().keys() == vocab.keys() - {"xa", "abcd"}
    assert report.merges_after == 4
    expected = tokenizer.tokenize(text)
    if set(expected) <= trimmed.get_vocab().keys():
        assert trimmed.tokenize(text) == expected
        assert torch.equal(_embed(smaller, trimmed, [text]), _embed(model, tokenizer, [text]))
    assert trimmed.decode(trimmed(text)["input_ids"][:-1]) == text


def test_the_released_folder_embeds_as_the_larger_one(whole, tokenizer, trimmed, kept_texts, tmp_path):
    texts = kept_texts[:64]
    build_sentence_transformer(whole, tokenizer).save_pretrained(str(tmp_path / "whole"), create_model_card=False)
    build_sentence_transformer(trimmed[0], trimmed[1]).save_pretrained(
        str(tmp_path / "trimmed"), create_model_card=False
    )
    for remote_code in (False, True):
        loaded = [
            SentenceTransformer(str(tmp_path / name), device="cpu", trust_remote_code=remote_code)
            for name in ("whole", "trimmed")
        ]
        np.testing.assert_array_equal(*(each.encode(texts) for each in loaded))
    assert loaded[1][0].auto_model.config.vocab_size == len(loaded[1].tokenizer)


_FEW = {"<|endoftext|>": 0, "<|im_end|>": 1, "a": 2, "b": 3, "ab": 4}


def _of_model(kind: str, **model: object):
    filled = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "unk_token": "a"}
    return lambda parts: parts.update(model={**filled, "type": kind, **model})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: parts["model"].update(byte_fallback=True), "marks words or bytes"),
        (lambda parts: parts["model"].update(end_of_word_suffix="</w>"), "marks words or bytes"),
        (lambda parts: parts.update(pre_tokenizer={"type": "Whitespace"}), "does not work on bytes"),
        (lambda parts: parts.update(pre_tokenizer=None), "does not work on bytes"),
        (lambda parts: parts["model"].update(vocab=_FEW, merges=[["a", "b"]]), "no token for some bytes"),
        (_of_model("WordPiece", vocab=_FEW), "is WordPiece"),
        (_of_model("WordLevel", vocab=_FEW), "is WordLevel"),
        (
            _of_model("Unigram", vocab=[[token, 0.0] for token in _FEW], unk_id=2, byte_fallback=False),
            "is Unigram",
        ),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(description, refuses, change, reason):
    change(description)
    if len(description["model"]["vocab"]) == len(_FEW):
        description["added_tokens"] = [each for each in description["added_tokens"] if each["id"] < 2]
    with refuses(reason, "only a byte-level BPE", "keep its vocabulary"):
        trim_vocabulary(*_model_and_tokenizer(description), [2])


def test_ids_that_no_token_has_are_refused(whole, tokenizer, refuses):
    with refuses(f"used token id {len(tokenizer)} is no token", "count ids with this tokenizer"):
        trim_vocabulary(whole, tokenizer, [5, len(tokenizer)])
    with refuses("used token id -1"):
        trim_vocabulary(whole, tokenizer, [-1])
    with refuses("up to 1999", "only 320 embeddings"):
        trim_vocabulary(make_model(), tokenizer, [5])
