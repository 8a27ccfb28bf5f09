"""The normalisation of text for everything that compares texts: duplicates, near duplicates and evaluation sets."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

from training.common.keyed import keyed_bits, text_key

# Scripts without spaces between words: a character with its marks is a token.
_UNSPACED = "".join(
    rf"\p{{{script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
# Punctuation is removed, but symbols are text: "C++" is not "C", and a row may ask for the name of a sign.
_TOKEN = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+|[[{_UNSPACED}ー]--\p{{P}}]\p{{M}}*|[\p{{S}}#%&@]"
)
_ASCII_TOKEN = re.compile(r"[a-z0-9]+|[$+<=>^`|~#%&@]")
# Invisible: soft hyphens, zero-width joiners, direction marks and variation selectors.
_INVISIBLE = regex.compile(r"[\p{Cf}\uFE00-\uFE0F]+")
# Keys of all code points, filled as characters are met, and which of them are known.
_KEYS, _KNOWN = np.zeros(0x110000, dtype=np.uint64), np.zeros(0x110000, dtype=bool)


def tokens(text: str) -> list[str]:
    """Return the words of a text, and the characters where its script has no spaces.

    Compatibility forms (NFKC), case, spacing, punctuation and invisible characters make no difference. A text of
    nothing but punctuation is one token; a blank text has none.

    Example:
        >>> tokens("Ｔｈｅ  cat—sat, C++")
        ['the', 'cat', 'sat', 'c', '+', '+']
        >>> tokens("ねこ on the mat")
        ['ね', 'こ', 'on', 'the', 'mat']
    """
    if text.isascii():
        found = _ASCII_TOKEN.findall(text.lower())
    else:
        text = unicodedata.normalize("NFKC", text).casefold()
        # Without case, or without what was between a letter and its mark, NFKC may compose once more.
        found = _TOKEN.findall(unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)))
    return found or ["".join(text.split())] * (not text.isspace() and bool(text))


def normalise(text: str) -> str:
    """Return the tokens of a text joined by spaces: texts that differ only in form become equal."""
    return " ".join(tokens(text))


def same_form(one: pa.Array, other: pa.Array, other_keys: np.ndarray | None = None) -> np.ndarray:
    """Return ``(n,)`` whether two ``large_string`` texts are equal once both are normalised; false where one is null.

    ``other_keys`` are the :func:`form_keys` of ``other``, if they are known.
    """
    same = np.asarray(pc.fill_null(pc.equal(one, other), False)).copy()
    there = np.asarray(pc.and_(pc.is_valid(one), pc.is_valid(other)))
    keys = form_keys(other) if other_keys is None else other_keys
    # Normalising takes a hundred times as long as comparing keys, so only pairs with equal keys are normalised.
    rows = np.flatnonzero(~same & there & (form_keys(one) == keys))
    pairs = zip(*(column.take(pa.array(rows)).to_pylist() for column in (one, other)), strict=True)
    same[rows] = [normalise(text) == normalise(another) for text, another in pairs]
    return same


def form_keys(texts: pa.Array) -> np.ndarray:
    """Return ``(n,)`` ``uint64`` keys of ``large_string`` texts, equal where the normalised texts are.

    Other texts share a key if they have the same characters: it is the sum of a key per character that :func:`tokens`
    keeps. Characters are decomposed, since in composed ones the order of addition would count. Null has no character.
    """
    ends = np.cumsum(np.append(0, pc.fill_null(pc.utf8_length(texts), 0)))
    joined = "".join(text or "" for text in texts.to_pylist())
    points = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")
    for point in set(points[~_KNOWN[points]].tolist()):
        _KEYS[point], _KNOWN[point] = _character_key(point), True
    sums = np.append(np.uint64(0), np.cumsum(_KEYS[points], dtype=np.uint64))[ends]
    return sums[1:] - sums[:-1]


def _character_key(point: int) -> int:
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", chr(point)).casefold())
    kept = [each for each in folded if unicodedata.category(each)[0] in "LMNS" or each in "#%&@"]
    return sum(text_key(each) for each in kept if not _INVISIBLE.match(each)) % 2**64


# Words repeat, so most hashes are looked up.
_token_key = lru_cache(maxsize=1 << 18)(text_key)


class HashedTexts(NamedTuple):
    """Hashes of normalised texts."""

    wholes: np.ndarray  # (texts,) uint64, of whole texts
    tokens: np.ndarray  # (sum of lengths,) uint64, of tokens
    lengths: np.ndarray  # (texts,) numbers of tokens


def hash_texts(texts: Sequence[str]) -> HashedTexts:
    """Normalise and hash texts, each as a whole and token by token."""
    split = [tokens(text) for text in texts]
    lengths = np.fromiter(map(len, split), dtype=np.int64, count=len(split))
    flat = (_token_key(token) for text in split for token in text)
    wholes = np.fromiter((text_key(" ".join(text)) for text in split), dtype=np.uint64, count=len(split))
    return HashedTexts(wholes, np.fromiter(flat, dtype=np.uint64, count=int(lengths.sum())), lengths)


def ngram_hashes(hashed: HashedTexts, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(grams,)`` hashes of all runs of ``n`` tokens within a text, and ``(grams,)`` indices of their texts."""
    count = max(len(hashed.tokens) - n + 1, 0)
    ends = np.cumsum(hashed.lengths)
    owner = np.repeat(np.arange(len(hashed.lengths)), hashed.lengths)[:count]
    starts = np.flatnonzero(np.arange(count) + n <= ends[owner])
    return keyed_bits(*(hashed.tokens[starts + i] for i in range(n))), owner[starts]
