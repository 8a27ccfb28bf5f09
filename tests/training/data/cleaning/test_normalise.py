"""One normalisation: forms of a text become equal, other texts stay apart, and every script has tokens."""

from __future__ import annotations

import unicodedata
from functools import partial

import numpy as np
import pyarrow as pa
import pytest

from training.data.cleaning.normalise import form_keys, hash_texts, ngram_hashes, normalise, same_form, tokens


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The cat sat.", "  the CAT\tsat  "),
        ("The cat sat", "Ｔｈｅ ｃａｔ　ｓａｔ！"),
        ("«Где кот?»", "где кот"),
        ("Straße", "STRASSE"),
        ("cafe\u0301 au lait", "Café, au lait"),
        ("soft\u00adware", "software"),
        ("cafe\u200d\u0301", "café"),
        ("\u1100\u200c\u1161", "가"),
        ("猫在垫子上。", "猫在 垫子 上"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("สวัสดี ชาวโลก", "สวัสดีชาวโลก"),
        ("क्या हाल है?", "क्या  हाल है।"),
        ("مرحبا، كيف الحال؟", "مرحبا كيف الحال"),
    ],
)
def test_forms_of_a_text_become_equal(one, other):
    assert normalise(one) == normalise(other) != ""


def test_other_texts_stay_apart_and_tokens_are_words_or_characters():
    pairs = [("C", "C++"), ("C", "C#"), ("$5", "€5"), ("!", "?"), ("😀", "😃"), ("résumé", "resume"), ("15", "1.5")]
    for one, other in [*pairs, ("an other", "another"), ("ガ", "カ"), ("कि", "की")]:
        assert normalise(one) != normalise(other), (one, other)
        assert normalise(one) and normalise(other)
    counts = {
        "one two, three": 3,
        "猫在垫子上": 5,
        "ねこがいる": 5,
        "고양이가 있다": 2,
        "สวัสดี": 4,
        "ພາສາລາວ": 7,
        "ភាសា": 2,
    }
    counts |= {"မြန်မာ": 3, "བོད་ཡིག": 4, "हिन्दी में": 2, "mixed 文字 text": 4, "  ": 0, "": 0}
    assert {text: len(tokens(text)) for text in counts} == counts


def test_ngrams_lie_within_one_text():
    hashed = hash_texts(["a b c d", "", "b c", "x b c d", "b", "C, d!"])
    grams, owner = ngram_hashes(hashed, 2)
    assert owner.tolist() == [0, 0, 0, 2, 3, 3, 3, 5]
    assert grams[1] == grams[3] == grams[5]
    assert grams[2] == grams[6] == grams[7]
    assert len(np.unique(grams)) == 4
    assert len(ngram_hashes(hashed, 5)[0]) == len(ngram_hashes(hash_texts([]), 2)[0]) == 0


def column(texts):
    return pa.array(texts, type=pa.large_string())


def test_texts_of_one_form_are_found_in_columns():
    one = ["Anguilla", "Anguilla", "Curac\u0327ao", "Guinea", "ab", "dog bites man", "…", None, "x", None, "日本 語"]
    other = ["Anguilla ", "anguilla.", "CURAÇAO", "Guiana", "a b", "man bites dog", "...", "x", None, None, "日本語。"]
    expected = [True, True, True, False, False, False, True, False, False, False, True]
    assert same_form(column(one), column(other)).tolist() == expected
    # A slice of a column is a column.
    assert same_form(column(one)[1:4], column(other)[1:4]).tolist() == expected[1:4]
    assert same_form(column([]), column([])).tolist() == []


def test_texts_of_one_form_share_a_key():
    """Every character that is assigned below U+3000, with what composes, folds or vanishes around it."""
    characters = [*map(chr, (*range(32, 0x3000), *range(0xF900, 0xFFF0)))]
    texts = ["".join(part) for part in zip(characters, characters[7:], characters[100:], strict=False)]
    forms = [str.upper, str.lower, *(partial(unicodedata.normalize, form) for form in ("NFD", "NFKC"))]
    pairs = {(text, form(text)) for text in texts for form in forms}
    pairs = [pair for pair in pairs if normalise(pair[0]) == normalise(pair[1])]
    assert len(pairs) > len(texts)
    one, other = (form_keys(column(list(side))) for side in zip(*pairs, strict=True))
    assert (one == other).all()
