"""Hard negatives of translations: other messages of the same program that share words with the message."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from training.common.keyed import keyed_bits, keyed_uniform, text_key
from training.data.cldr.draws import first_distinct, for_purpose, grouped
from training.data.gettext_catalogs.corpus import Corpus

# Neighbours kept of each message for one negative drawn: a row's negatives differ by language, all being hard.
_NEIGHBOURS_PER_NEGATIVE = 2
# Beyond shared words, messages of one length are harder to tell apart.
_LENGTH_WEIGHT = 0.1
# Elements of one matrix of similarities or of candidates: bounds its memory to some tens of megabytes.
_CHUNK_ELEMENTS = 4_000_000


class Negatives:
    """Draws negatives for rows of a corpus.

    No negative translates its query: two messages that any language ever translates alike are not each other's
    negatives.

    Args:
        corpus: The corpus.
        rows: The rows that may appear in training.
        count: Negatives of a row.
    """

    def __init__(self, corpus: Corpus, rows: NDArray[np.intp], count: int) -> None:
        self._corpus, self._rows, self._count = corpus, rows, count
        self._concepts = np.unique(corpus.concept[rows])
        self._alike = _alike(corpus, rows)
        self._neighbours = _neighbours(corpus, rows, count * _NEIGHBOURS_PER_NEGATIVE)
        # The first row of each (language, concept), to look up in.
        places = corpus.language[rows] * len(corpus.english) + corpus.concept[rows]
        self._places, first = np.unique(places, return_index=True)
        self._at_place = rows[first]
        self._of_language = dict(grouped(corpus.language[rows], rows))

    def english(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """``(rows, count)`` concepts whose English texts are negatives of the rows, -1 throughout if too few."""
        drawn = np.full((len(rows), self._count), -1, dtype=np.intp)
        for start in range(0, len(rows), self._rows_at_once):
            part = rows[start : start + self._rows_at_once]
            keys = for_purpose(self._corpus.key[part], "English negatives")
            items = np.concatenate((self._near(part, keys), _drawn(self._concepts, keys, self._spare)), axis=1)
            valid = self._may_have(part, items)
            drawn[start : start + len(part)] = first_distinct(items, valid, self._corpus.english_text, self._count)
        return drawn

    def same_language(self, rows: NDArray[np.intp], passages: NDArray[np.intp]) -> NDArray[np.intp]:
        """``(rows, count)`` rows in the passages' languages that are negatives, -1 throughout if too few.

        Args:
            rows: The queries, (rows,).
            passages: Rows of the same concepts in other languages, (rows,).
        """
        corpus = self._corpus
        drawn = np.full((len(rows), self._count), -1, dtype=np.intp)
        for language, positions in grouped(corpus.language[passages], np.arange(len(rows))):
            for start in range(0, len(positions), self._rows_at_once):
                part = positions[start : start + self._rows_at_once]
                keys = for_purpose(corpus.key[rows[part]], "negatives of one language")
                near = self._look_up(language, self._near(rows[part], keys))
                items = np.concatenate((near, _drawn(self._of_language[language], keys, self._spare)), axis=1)
                valid = (items >= 0) & self._may_have(rows[part], corpus.concept[items])
                valid &= (corpus.text[items] != corpus.text[rows[part]][:, None]) & (
                    corpus.text[items] != corpus.text[passages[part]][:, None]
                )
                drawn[part] = first_distinct(items, valid, corpus.text, self._count)
        return drawn

    @property
    def _spare(self) -> int:
        """Messages drawn from anywhere, for programs with few."""
        return 2 * self._count + 8

    @property
    def _rows_at_once(self) -> int:
        return max(1, _CHUNK_ELEMENTS // (self._neighbours.shape[1] + self._spare))

    def _near(self, rows: NDArray[np.intp], keys: NDArray[np.uint64]) -> NDArray[np.intp]:
        """The neighbours of the rows' concepts in an order drawn for each row; -1 where there are no more."""
        near = self._neighbours[self._corpus.concept[rows]]
        order = np.argsort(keyed_bits(keys[:, None], np.arange(near.shape[1])), axis=1)
        return np.take_along_axis(near, order, axis=1)

    def _may_have(self, rows: NDArray[np.intp], concepts: NDArray[np.intp]) -> NDArray[np.bool_]:
        own = self._corpus.concept[rows][:, None]
        same = (concepts == own) | (self._corpus.english_text[concepts] == self._corpus.text[rows][:, None])
        return (concepts >= 0) & ~same & ~_is_in(own * len(self._corpus.english) + concepts, self._alike)

    def _look_up(self, language: int, concepts: NDArray[np.intp]) -> NDArray[np.intp]:
        """The rows of the concepts in a language, -1 where it has none."""
        wanted = language * len(self._corpus.english) + concepts
        found = np.minimum(np.searchsorted(self._places, wanted), len(self._places) - 1)
        return np.where((concepts >= 0) & (self._places[found] == wanted), self._at_place[found], -1)


def _is_in(values: NDArray[np.intp], ordered: NDArray[np.intp]) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(values.shape, dtype=bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def _drawn(pool: NDArray[np.intp], keys: NDArray[np.uint64], count: int) -> NDArray[np.intp]:
    draws = keyed_bits(for_purpose(keys, "anywhere")[:, None], np.arange(count))
    return pool[(draws % np.uint64(len(pool))).astype(np.intp)]


def _alike(corpus: Corpus, rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Pairs of concepts with a translation in common, as ``first * concepts + second``, in order."""
    ordered = rows[np.lexsort((corpus.concept[rows], corpus.text[rows], corpus.language[rows]))]
    language, text = corpus.language[ordered], corpus.text[ordered]
    new = np.flatnonzero((language[1:] != language[:-1]) | (text[1:] != text[:-1])) + 1
    found = [
        (concepts[:, None] * len(corpus.english) + concepts[None, :]).ravel()
        for concepts in np.split(corpus.concept[ordered], new)
        if len(concepts) > 1
    ]
    return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.intp)


def _neighbours(corpus: Corpus, rows: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """``(concepts, count)`` concepts of the same domain that share most words with each, -1 where there are no more.

    A concept of several domains has the neighbours of the first.
    """
    concepts, first = np.unique(corpus.concept[rows], return_index=True)
    texts = [corpus.english[concept] for concept in concepts.tolist()]
    vectors = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, dtype=np.float64).fit_transform(texts)
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    # Less than any difference that matters; it makes every order certain, on every machine.
    unique = 1e-9 * keyed_uniform(np.array([text_key(text) for text in texts], dtype=np.uint64))
    nearest = np.full((len(corpus.english), count), -1, dtype=np.intp)
    for _, members in grouped(corpus.domain[rows[first]], np.arange(len(concepts))):
        kept = min(count, len(members) - 1)
        step = max(1, _CHUNK_ELEMENTS // len(members))
        transposed = vectors[members].T.tocsc()
        for start in range(0, len(members) if kept else 0, step):
            part = members[start : start + step]
            alike = (vectors[part] @ transposed).toarray()
            shorter = np.minimum(lengths[part][:, None], lengths[members])
            alike += _LENGTH_WEIGHT * shorter / np.maximum(lengths[part][:, None], lengths[members]) + unique[members]
            alike[np.arange(len(part)), np.arange(start, start + len(part))] = -1.0
            # The nearest, then in order: a partition leaves them in none.
            best = np.argpartition(-alike, kept - 1, axis=1)[:, :kept]
            order = np.argsort(-np.take_along_axis(alike, best, axis=1), axis=1)
            nearest[concepts[part], :kept] = concepts[members[np.take_along_axis(best, order, axis=1)]]
    return nearest
