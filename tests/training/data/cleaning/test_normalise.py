"""One normalisation: forms of a text become equal, other texts stay apart, and every script has tokens."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.cleaning.normalise import hash_texts, ngram_hashes, normalise, tokens


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The cat sat.", "  the CAT\tsat  "),
        ("The cat sat", "Ｔｈｅ ｃａｔ　ｓａｔ！"),
        ("«Где кот?»", "где кот"),
        ("Straße", "STRASSE"),
        ("cafe\u0301 au lait", "Café, au lait"),
        ("soft\u00adware", "software"),
        ("猫在垫子上。", "猫在 垫子 上"),
        ("ｶﾀｶﾅ", "カタカナ"),
        ("สวัสดี ชาวโลก", "สวัสดีชาวโลก"),
        ("क्या हाल है?", "क्या  हाल है।"),
        ("مرحبا، كيف الحال؟", "مرحبا كيف الحال"),
    ],
)
def test_forms_of_a_text_become_equal(one: str, other: str) -> None:
    assert normalise(one) == normalise(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("C", "C++"),
        ("C", "C#"),
        ("$5", "€5"),
        ("!", "?"),
        ("😀", "😃"),
        ("résumé", "resume"),
        ("an other", "another"),
        ("15", "1.5"),
        ("ガ", "カ"),
        ("कि", "की"),
    ],
)
def test_other_texts_stay_apart(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)
    assert normalise(one) and normalise(other)


def test_normalising_again_changes_nothing() -> None:
    for text in ("Ｔｈｅ  cat—sat, C++", "ねこ on the mat", "สวัสดีครับ", "İstanbul ﬁne", "!!!", "ǰ ΐ ὗ"):
        assert tokens(normalise(text)) == tokens(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("one two, three", 3),
        ("猫在垫子上", 5),
        ("ねこがいる", 5),
        ("고양이가 있다", 2),
        ("สวัสดี", 4),
        ("ພາສາລາວ", 7),
        ("ភាសា", 2),
        ("မြန်မာ", 3),
        ("བོད་ཡིག", 4),
        ("हिन्दी में", 2),
        ("mixed 文字 text", 4),
        ("  ", 0),
        ("", 0),
    ],
)
def test_tokens_are_words_or_characters(text: str, count: int) -> None:
    assert len(tokens(text)) == count


def test_ngrams_lie_within_one_text() -> None:
    hashed = hash_texts(["a b c d", "", "b c", "x b c d", "b", "C, d!"])
    grams, owner = ngram_hashes(hashed, 2)
    assert owner.tolist() == [0, 0, 0, 2, 3, 3, 3, 5]
    assert grams[1] == grams[3] == grams[5]
    assert grams[2] == grams[6] == grams[7]
    assert len(np.unique(grams)) == 4
    assert len(ngram_hashes(hashed, 5)[0]) == len(ngram_hashes(hash_texts([]), 2)[0]) == 0
