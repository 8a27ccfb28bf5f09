"""Names of territories, languages, scripts and currencies in Unicode CLDR, read from ``babel``."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from babel import localedata
from scipy.sparse import csr_array

from training.common.errors import UserError
from training.common.keyed import keyed_bits, keyed_uniform, text_key
from training.common.languages import iso639_3, script_of
from training.data.cldr.draws import Keys, Mask, Rows
from training.data.cleaning.normalise import normalise

logger = logging.getLogger(__name__)

ENGLISH = "en"
# Kinds of names, and babel's tables of them.
_TABLES = {"territory": "territories", "language": "languages", "script": "scripts", "currency": "currency_names"}
KINDS = tuple(_TABLES)
# A locale with fewer names is a stub with too few to draw negatives from.
MIN_NAMES = 50
# The three longer names contain a translator's notes (Bosnian mark in Somali, Hans in Kashmiri).
MAX_NAME_LENGTH = 100
# Pseudo-locales for testing software, which CLDR lists among the territories.
_PSEUDO_LOCALES = frozenset({"XA", "XB"})
# Direction marks are for display and not part of a name.
_DIRECTION_MARKS = dict.fromkeys(map(ord, "\u061c\u200e\u200f"))


@dataclass(frozen=True, eq=False)
class CldrNames:
    """A table of names with one row per (concept, language), sorted by language, kind and code."""

    texts: tuple[str, ...]
    concept: Rows  # index of each row into concepts
    language: Rows  # index of each row into languages
    is_english: Mask  # of each row
    kind: Rows  # index of each row into KINDS
    group: Rows  # number of the language and kind of each row
    text_id: Rows  # number of the normal form of each row's text, which other spellings share
    draw_key: Keys  # key of each row for draws
    concepts: tuple[tuple[str, str], ...]  # (kind, CLDR code); each one has an English name
    languages: tuple[str, ...]  # CLDR identifiers
    codes: tuple[str, ...]  # ISO 639-3 code of each language
    scripts: tuple[str, ...]  # ISO 15924 code of the script of each language

    @cached_property
    def english(self) -> Rows:
        """The row of the English name of each concept, shape (concepts,)."""
        rows = np.flatnonzero(self.is_english)
        return rows[np.argsort(self.concept[rows])]

    @cached_property
    def kinds_named(self) -> Rows:
        """The kinds that the text of each row names in any language, bit ``i`` for ``KINDS[i]``, shape (names,)."""
        named = np.zeros(self.text_id.max() + 1, dtype=np.intp)
        np.bitwise_or.at(named, self.text_id, 1 << self.kind)
        return named[self.text_id]

    @cached_property
    def confusable(self) -> Mask:
        """Whether some text names both concepts, or each of them and a third one, shape (concepts, concepts)."""
        occurs = csr_array((np.ones(len(self.texts), dtype=np.float32), (self.text_id, self.concept)))
        shares = ((occurs.T @ occurs).toarray() > 0).astype(np.float32)
        return shares @ shares > 0

    def partners(self, values: Rows) -> Rows:
        """Count the different values that the text of each row occurs with, shape (names,)."""
        pairs = np.unique(np.stack((self.text_id, values), axis=1), axis=0)
        return np.bincount(pairs[:, 0])[self.text_id]

    def held_out(self, share: float) -> Mask:
        """Choose the names to hold out, (names,): a drawn share of those that are not English and name one concept."""
        proposed = ~self.is_english & (keyed_uniform(text_key("held out"), self.draw_key) < share)
        staying = np.bincount(self.text_id, weights=~proposed)[self.text_id]
        return (staying == 0) & (self.partners(self.concept) == 1)


def read_names(seed: int, languages: Sequence[str] | None = None) -> CldrNames:
    """Read the names of every language that has at least ``MIN_NAMES`` of them; the seed is that of draw keys.

    ``languages`` are CLDR identifiers to read besides English, or None for all base languages (those without ``_``).
    """
    known = sorted(identifier for identifier in localedata.locale_identifiers() if "_" not in identifier)
    if unknown := sorted({*(languages or ())} - {*known}):
        raise UserError(f"languages {unknown} are not base languages of CLDR; use identifiers such as 'de' or 'yue'")
    english = _names_in(ENGLISH)
    concepts = tuple(sorted(english, key=lambda concept: (KINDS.index(concept[0]), concept[1])))
    # Text, concept, language and the label of the draw key of each name.
    rows: list[tuple[str, int, int, str]] = []
    kept: list[tuple[str, str, str]] = []
    for identifier in known if languages is None else sorted({ENGLISH, *languages}):
        names = _names_in(identifier)
        if len(names) < MIN_NAMES:
            continue
        try:
            described = (identifier, iso639_3(identifier), script_of(identifier))
        except ValueError as error:
            logger.warning("Skipped %s: %s", identifier, error)
            continue
        for position, concept in enumerate(concepts):
            name = names.get(concept)
            # Skip untranslated codes: "armi" for Imperial Aramaic, but not "Fon" for Fon.
            if name and not normalise(name) == normalise(concept[1]) != normalise(english[concept]):
                rows.append((name, position, len(kept), "|".join((*concept, identifier))))
        kept.append(described)

    texts, *numbers, labels = zip(*rows, strict=True)
    concept, language = np.array(numbers, dtype=np.intp)
    kind = np.array([KINDS.index(kind) for kind, _ in concepts])[concept]
    return CldrNames(
        texts,
        concept,
        language,
        language == [identifier for identifier, *_ in kept].index(ENGLISH),
        kind,
        language * len(KINDS) + kind,
        pd.factorize(np.array([normalise(text) for text in texts], dtype=object))[0],
        keyed_bits(seed, np.array([text_key(label) for label in labels], dtype=np.uint64)),
        concepts,
        *zip(*kept, strict=True),
    )


def _names_in(identifier: str) -> dict[tuple[str, str], str]:
    """Read the usable names of one locale by (kind, code)."""
    # Not `localedata.load`: it may include names that are inherited from another locale, because it keeps the copy
    # that the first caller in the process asked for.
    data = pickle.loads(Path(localedata.resolve_locale_filename(identifier)).read_bytes())
    names = {}
    for kind, table in _TABLES.items():
        for code, name in data.get(table, {}).items():
            cleaned = " ".join(name.translate(_DIRECTION_MARKS).split())
            if cleaned and len(cleaned) <= MAX_NAME_LENGTH and code not in _PSEUDO_LOCALES:
                names[kind, code] = cleaned
    return names
