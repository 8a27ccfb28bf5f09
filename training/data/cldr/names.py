"""The names that Unicode CLDR gives to territories, languages, scripts and currencies, read from ``babel``."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path

import numpy as np
from babel import localedata
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.keyed import keyed_bits, keyed_uniform, text_key
from training.common.languages import iso639_3, script_of
from training.data.cldr.draws import grouped
from training.data.cleaning.normalise import normalise

logger = logging.getLogger(__name__)

ENGLISH = "en"
KINDS = ("territory", "language", "script", "currency")
_TABLES = {"territory": "territories", "language": "languages", "script": "scripts", "currency": "currency_names"}
# A locale with fewer names is a stub: too few to draw negatives from.
MIN_NAMES = 50
# The three names longer than this hold a translator's notes, not a name (Bosnian mark in Somali, Hans in Kashmiri).
MAX_NAME_LENGTH = 100
# Pseudo-locales for testing software, which CLDR lists among the territories.
_NO_NAMES = frozenset({"XA", "XB"})
# Direction marks serve the display of a name, and do not belong to it.
_DIRECTION_MARKS = {ord(mark): None for mark in "\u061c\u200e\u200f"}


@dataclass(frozen=True, eq=False)
class CldrNames:
    """A table of names, one row a (concept, language), sorted by language, kind and code.

    Attributes:
        texts: The name in each row.
        concept: Each row's index into ``concepts``, shape (names,).
        language: Each row's index into ``languages``, shape (names,).
        text_id: The number of each row's normal form, which texts in another spelling share, shape (names,).
        draw_key: Each row's 64-bit key for draws, shape (names,).
        concepts: (kind, CLDR code) of every concept; each one has an English name.
        languages: The CLDR identifiers of the languages.
        codes: The ISO 639-3 code of each language.
        scripts: The ISO 15924 code of the script of each language.
    """

    texts: tuple[str, ...]
    concept: NDArray[np.intp]
    language: NDArray[np.intp]
    text_id: NDArray[np.intp]
    draw_key: NDArray[np.uint64]
    concepts: tuple[tuple[str, str], ...]
    languages: tuple[str, ...]
    codes: tuple[str, ...]
    scripts: tuple[str, ...]

    @cached_property
    def is_english(self) -> NDArray[np.bool_]:
        """Whether each row is in English, shape (names,)."""
        return self.language == self.languages.index(ENGLISH)

    @cached_property
    def english(self) -> NDArray[np.intp]:
        """The row of each concept's English name, shape (concepts,)."""
        rows = np.flatnonzero(self.is_english)
        return rows[np.argsort(self.concept[rows])]

    @cached_property
    def kind(self) -> NDArray[np.intp]:
        """Each row's index into ``KINDS``, shape (names,)."""
        return np.array([KINDS.index(kind) for kind, _ in self.concepts])[self.concept]

    @cached_property
    def kinds_named(self) -> NDArray[np.intp]:
        """The kinds that each row's text names in any language, bit ``i`` for ``KINDS[i]``, shape (names,)."""
        named = np.zeros(self.text_id.max() + 1, dtype=np.intp)
        np.bitwise_or.at(named, self.text_id, 1 << self.kind)
        return named[self.text_id]

    @cached_property
    def languages_naming(self) -> NDArray[np.intp]:
        """The number of languages in which each row's text is a name, shape (names,)."""
        return _distinct_partners(self.text_id, self.language)

    @cached_property
    def confusable(self) -> NDArray[np.bool_]:
        """Whether a name of one concept may stand for the other one, shape (concepts, concepts).

        Two concepts are confusable when some text, in whatever language, names both, or when a third concept shares
        a text with each. No confusable concept's name may be a negative: the text alone does not tell which is meant.
        """
        shares = np.eye(len(self.concepts), dtype=np.float32)
        ambiguous = np.flatnonzero(_distinct_partners(self.text_id, self.concept) > 1)
        for _, rows in grouped(self.text_id[ambiguous], ambiguous):
            for one, other in permutations(np.unique(self.concept[rows]).tolist(), 2):
                shares[one, other] = 1
        return shares @ shares > 0

    def held_out(self, share: float) -> NDArray[np.bool_]:
        """Chooses the names to hold out of training.

        A keyed draw proposes ``share`` of the names that are not English. A proposed text is held out only if it is
        nowhere the name of another concept, and if no name of the same text, in any language, stays in training.

        Args:
            share: The share to propose, in [0, 1).

        Returns:
            Whether each row is held out, shape (names,).
        """
        proposed = ~self.is_english & (keyed_uniform(text_key("held out"), self.draw_key) < share)
        staying = np.bincount(self.text_id, weights=~proposed)[self.text_id]
        return (staying == 0) & (_distinct_partners(self.text_id, self.concept) == 1)


def read_names(seed: int, languages: Sequence[str] | None = None) -> CldrNames:
    """Reads the names of every language that has at least ``MIN_NAMES`` of them.

    Args:
        seed: The seed of the rows' draw keys.
        languages: CLDR identifiers to read besides English, or None for all base languages (those without ``_``).

    Raises:
        UserError: A language asked for is not a base language of CLDR.
    """
    known = sorted(identifier for identifier in localedata.locale_identifiers() if "_" not in identifier)
    if languages is None:
        wanted = known
    elif unknown := sorted(set(languages) - set(known)):
        raise UserError(f"languages {unknown} are not base languages of CLDR; use identifiers such as 'de' or 'yue'")
    else:
        wanted = sorted({ENGLISH, *languages})

    english = _names_in(ENGLISH)
    concepts = tuple(sorted(english, key=lambda concept: (KINDS.index(concept[0]), concept[1])))
    rows: list[tuple[str, int, int]] = []
    kept, codes, scripts = [], [], []
    for identifier in wanted:
        names = _names_in(identifier)
        if len(names) < MIN_NAMES:
            logger.debug("Skipped %s: %d names, fewer than %d", identifier, len(names), MIN_NAMES)
            continue
        try:
            code, script = iso639_3(identifier), script_of(identifier)
        except ValueError as error:
            logger.warning("Skipped %s: %s", identifier, error)
            continue
        for position, concept in enumerate(concepts):
            name = names.get(concept)
            if name is not None and not _is_placeholder(name, concept[1], english[concept]):
                rows.append((name, position, len(kept)))
        kept.append(identifier)
        codes.append(code)
        scripts.append(script)

    texts, concept_index, language_index = zip(*rows, strict=True)
    numbers: dict[str, int] = {}
    labels = [f"{concepts[concept][0]}|{concepts[concept][1]}|{kept[language]}" for _, concept, language in rows]
    return CldrNames(
        texts=texts,
        concept=np.array(concept_index, dtype=np.intp),
        language=np.array(language_index, dtype=np.intp),
        text_id=np.array([numbers.setdefault(normalise(text), len(numbers)) for text in texts], dtype=np.intp),
        draw_key=keyed_bits(seed, np.array([text_key(label) for label in labels], dtype=np.uint64)),
        concepts=concepts,
        languages=tuple(kept),
        codes=tuple(codes),
        scripts=tuple(scripts),
    )


def _names_in(identifier: str) -> dict[tuple[str, str], str]:
    """Reads the usable names of one locale, by (kind, code)."""
    # Names inherited from another locale are not this language's own. `localedata.load` keeps one copy of a locale,
    # with or without what it inherits, as the first caller in the process asked.
    data = pickle.loads(Path(localedata.resolve_locale_filename(identifier)).read_bytes())
    names = {}
    for kind in KINDS:
        for code, name in data.get(_TABLES[kind], {}).items():
            cleaned = " ".join(name.translate(_DIRECTION_MARKS).split())
            if cleaned and len(cleaned) <= MAX_NAME_LENGTH and code not in _NO_NAMES:
                names[kind, code] = cleaned
    return names


def _is_placeholder(name: str, code: str, english: str) -> bool:
    """Whether a name is only its code, left untranslated ("armi" for Imperial Aramaic, but not "Fon" for Fon)."""
    return normalise(name) == normalise(code) != normalise(english)


def _distinct_partners(values: NDArray[np.intp], partners: NDArray[np.intp]) -> NDArray[np.intp]:
    """Counts, for each row, the different partners that its value has among all rows."""
    pairs = np.unique(np.stack((values, partners), axis=1), axis=0)
    return np.bincount(pairs[:, 0])[values]
