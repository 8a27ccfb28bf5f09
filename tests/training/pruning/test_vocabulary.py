"""A trimmed vocabulary: the same pieces where they survive, no text lost, embeddings equal to the last bit."""

from __future__ import annotations

import json
import random
import unicodedata
from copy import deepcopy

import pytest
import torch
from babel import localedata
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeling_f2llm import append_eos
from tests.training.pruning.pruned_models import make_model
from training.models.loading import train_tokenizer
from training.pruning.vocabulary import VocabularyReport, trim_vocabulary

ROWS = 2048
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
    return [name for locale in ("de", "en", "hi", "ru", "zh") for name in names[locale][::3]]


@pytest.fixture(scope="module")
def trimmed(whole, tokenizer, kept_texts):
    used = {token for ids in tokenizer(kept_texts)["input_ids"] for token in ids}
    return trim_vocabulary(whole, tokenizer, used)


@pytest.fixture(scope="module")
def all_texts(names):
    """Names in more than 200 languages, emoji, whitespace, and any characters that Unicode may ever assign."""
    rng = random.Random(0)
    characters = [chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000]
    drawn = ["".join(rng.choices(characters, k=rng.randrange(1, 30))) for _ in range(500)]
    return [name for each in names.values() for name in each[::6]] + EMOJI + WHITESPACE + drawn


@pytest.fixture
def description(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _tokenizer_of(description):
    backend = Tokenizer.from_str(json.dumps(description))
    return append_eos(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    )


def _embed(model, tokenizer, texts):
    ids = tokenizer(texts)["input_ids"]
    flat = torch.tensor([token for each in ids for token in each])[None]
    with torch.no_grad():
        return model(input_ids=flat, sequence_lengths=[len(each) for each in ids]).last_hidden_state


def test_no_text_is_lost_and_pieces_that_survive_are_the_same(tokenizer, trimmed, all_texts, kept_texts, names):
    assert len(names) > 200
    backend = trimmed[1].backend_tokenizer
    for text, encoded in zip(all_texts, backend.encode_batch(all_texts, add_special_tokens=False), strict=True):
        # The tokenizer reads NFC, trimmed or not.
        assert backend.decode(encoded.ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
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


def test_embeddings_of_kept_texts_are_the_same_to_the_last_bit_and_new_ids_leave_no_gap(
    whole, tokenizer, trimmed, kept_texts
):
    model, smaller, report = trimmed
    texts = kept_texts[:200]
    assert torch.equal(_embed(model, smaller, texts), _embed(whole, tokenizer, texts))
    # Piece by piece: each has the row it had.
    before, after = tokenizer.get_vocab(), smaller.get_vocab()
    for token, number in after.items():
        assert torch.equal(model.embed_tokens.weight[number], whole.embed_tokens.weight[before[token]]), token
    assert sorted(after.values()) == list(range(model.config.vocab_size))
    assert sorted(after, key=after.get) == sorted(after, key=before.get)
    assert {*tokenizer.all_special_tokens} == {*smaller.all_special_tokens}
    for name in ("eos_token", "pad_token", "padding_side", "truncation_side", "model_max_length"):
        assert getattr(smaller, name) == getattr(tokenizer, name), name
    counted = VocabularyReport(len(tokenizer), len(smaller), whole.num_parameters(), model.num_parameters())
    assert report == counted and f"{len(tokenizer):,} -> {len(smaller):,} tokens" in str(report)


def test_special_tokens_move_in_configuration_and_post_processor(description):
    # Special tokens with the highest ids, as Qwen has them: all of them move.
    vocab = description["model"]["vocab"]
    special = [each["content"] for each in description["added_tokens"]]
    ids = {token: number for number, token in enumerate([*(each for each in vocab if each not in special), *special])}
    description["model"]["vocab"] = {token: ids[token] for token in sorted(vocab, key=ids.get)}
    for each in description["added_tokens"]:
        each["id"] = ids[each["content"]]
    description["post_processor"] = None
    tokenizer, eos, pad = _tokenizer_of(description), ids["<|im_end|>"], ids["<|endoftext|>"]
    model = make_model(vocab_size=ROWS, eos_token_id=[eos, pad], pad_token_id=pad, bos_token_id=ROWS - 1)
    smaller, trimmed, _ = trim_vocabulary(model, tokenizer, tokenizer("the red river")["input_ids"])
    assert trimmed.eos_token_id < eos
    assert smaller.config.eos_token_id == [trimmed.eos_token_id, trimmed.pad_token_id]
    assert smaller.config.pad_token_id == trimmed.pad_token_id
    assert smaller.config.bos_token_id is None  # no token has that id
    assert trimmed("the red river")["input_ids"][-1] == trimmed.eos_token_id
    assert trimmed("a", "b")["input_ids"].count(trimmed.eos_token_id) == 2
    assert trimmed("x<|im_start|>y")["input_ids"][1] == trimmed.get_vocab()["<|im_start|>"]


def test_all_tokens_or_bytes_and_special_tokens_are_kept_and_what_was_given_is_not_changed(tokenizer, all_texts):
    whole = make_model(vocab_size=ROWS)
    state, config, backend = deepcopy(whole.state_dict()), whole.config.to_dict(), tokenizer.backend_tokenizer.to_str()
    model, same, _ = trim_vocabulary(whole, tokenizer, range(len(tokenizer)))
    assert same.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(model.embed_tokens.weight, whole.embed_tokens.weight[: len(tokenizer)])
    assert same(all_texts)["input_ids"] == tokenizer(all_texts)["input_ids"]
    smaller, least, report = trim_vocabulary(whole, tokenizer, [])
    assert report.tokens_after == 256 + len(tokenizer.all_special_tokens)
    bytes_of = [len(unicodedata.normalize("NFC", text).encode()) for text in EMOJI]
    assert [len(ids) - 1 for ids in least(EMOJI)["input_ids"]] == bytes_of
    for weight in (*model.parameters(), *smaller.parameters()):
        weight.data.zero_()
    assert all(torch.equal(weight, state[name]) for name, weight in whole.state_dict().items())
    assert whole.config.to_dict() == config and tokenizer.backend_tokenizer.to_str() == backend


def test_padding_and_truncation_of_a_call_do_not_stay_and_other_ids_are_refused(whole, tokenizer, kept_texts, refuses):
    changed = deepcopy(tokenizer)
    changed(kept_texts[:4], padding=True, truncation=True, max_length=4)
    assert changed.backend_tokenizer.padding and changed.backend_tokenizer.truncation
    _, trimmed, _ = trim_vocabulary(whole, changed, range(len(tokenizer)))
    # Runtimes that read tokenizer.json alone would pad and truncate too.
    assert trimmed.backend_tokenizer.padding is None and trimmed.backend_tokenizer.truncation is None
    for model, used in ((whole, [5, len(tokenizer)]), (whole, [-1]), (make_model(), [5])):
        with refuses("use the tokenizer of the model's training"):
            trim_vocabulary(model, tokenizer, used)


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
    model, tokenizer = make_model(vocab_size=ROWS), _tokenizer_of(description)
    smaller, trimmed, _ = trim_vocabulary(model, tokenizer, [vocab["abc"]])
    assert trimmed.get_vocab().keys() == vocab.keys() - {"xa", "abcd"}
    expected = tokenizer.tokenize(text)
    if set(expected) <= trimmed.get_vocab().keys():
        assert trimmed.tokenize(text) == expected
        assert torch.equal(_embed(smaller, trimmed, [text]), _embed(model, tokenizer, [text]))
    assert trimmed.decode(trimmed(text)["input_ids"][:-1]) == text


_FEW = {"<|endoftext|>": 0, "<|im_end|>": 1, "a": 2, "b": 3, "ab": 4}
_WORDS = {"type": "WordLevel", "vocab": _FEW, "unk_token": "a"}


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts["model"].update(byte_fallback=True),
        lambda parts: parts["model"].update(end_of_word_suffix="</w>"),
        lambda parts: parts.update(pre_tokenizer={"type": "Whitespace"}),
        lambda parts: parts.update(pre_tokenizer=None),
        lambda parts: parts["model"].update(vocab=_FEW, merges=[["a", "b"]]),
        lambda parts: parts.update(model=_WORDS),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(description, refuses, change):
    change(description)
    if len(description["model"]["vocab"]) == len(_FEW):
        description["added_tokens"] = [each for each in description["added_tokens"] if each["id"] < 2]
    with refuses("only a byte-level BPE", "keep its vocabulary"):
        trim_vocabulary(make_model(vocab_size=ROWS), _tokenizer_of(description), [2])
