"""One normalisation of text for everything that compares texts: duplicates, near duplicates and evaluation sets."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import regex

from training.keyed import keyed_bits, text_key

__all__ = ["HashedTexts", "hash_texts", "ngram_hashes", "normalise", "tokens"]

# Scripts that put no space between words: a character, with the marks upon it, is a token.
_UNSPACED = "".join(
    rf"\p{{{script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
# Punctuation goes, but symbols are text: "C++" is not "C", and a row may ask for the name of a sign.
_TOKEN = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+|[[{_UNSPACED}ー]--\p{{P}}]\p{{M}}*|[\p{{S}}#%&@]"
)
_ASCII_TOKEN = re.compile(r"[a-z0-9]+|[$+<=>^`|~#%&@]")
# Soft hyphens, zero-width joiners, marks of direction and variation selectors: nobody sees them.
_INVISIBLE = regex.compile(r"[\p{Cf}\uFE00-\uFE0F]+")


def tokens(text: str) -> list[str]:
    """The words of a text, and the characters where its script has no spaces.

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
        # Folding case can leave a form that NFKC composes once more.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        found = _TOKEN.findall(_INVISIBLE.sub("", text))
    return found or ["".join(text.split())] * (not text.isspace() and bool(text))


def normalise(text: str) -> str:
    """The tokens of a text with one space between them: texts that differ in form only become equal."""
    return " ".join(tokens(text))


# Words repeat: most hashes are looked up.
_token_key = lru_cache(maxsize=1 << 18)(text_key)


class HashedTexts(NamedTuple):
    """Texts as numbers.

    Attributes:
        wholes: ``(texts,)`` ``uint64``, a hash of each normalised text.
        tokens: ``(sum of lengths,)`` ``uint64``, the hash of each token.
        lengths: ``(texts,)`` number of tokens.
    """

    wholes: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray


def hash_texts(texts: Sequence[str]) -> HashedTexts:
    """Normalises and hashes texts, each whole and token by token."""
    split = [tokens(text) for text in texts]
    lengths = np.fromiter(map(len, split), dtype=np.int64, count=len(split))
    flat = (_token_key(token) for text in split for token in text)
    wholes = np.fromiter((text_key(" ".join(text)) for text in split), dtype=np.uint64, count=len(split))
    return HashedTexts(wholes, np.fromiter(flat, dtype=np.uint64, count=int(lengths.sum())), lengths)


def ngram_hashes(hashed: HashedTexts, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of ``n`` tokens that lie within one text.

    Returns:
        ``(grams,)`` ``uint64`` hashes and ``(grams,)`` position of the text that each lies in.
    """
    count = max(len(hashed.tokens) - n + 1, 0)
    ends = np.cumsum(hashed.lengths)
    owner = np.repeat(np.arange(len(hashed.lengths)), hashed.lengths)[:count]
    starts = np.flatnonzero(np.arange(count) + n <= ends[owner])
    return keyed_bits(*(hashed.tokens[starts + i] for i in range(n))), owner[starts]
