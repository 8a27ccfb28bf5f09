"""The messages of installed catalogs as one table of translations, with whole programs held out."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.cleaning.normalise import normalise
from training.data.gettext_catalogs.catalogs import CatalogFile, find_catalogs, program_of, read_messages
from training.data.gettext_catalogs.cleaning import clean_pair

logger = logging.getLogger(__name__)

Language = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Distinct translations, one a row, in the order of their languages.

    Two texts are the same if they differ in nothing but case, punctuation and spacing.

    Attributes:
        english: The distinct English texts; a number of one is called a concept here.
        english_text: The identity of each English text, (concepts,).
        languages: (ISO 639-3 code, ISO 15924 script) of each language.
        domains: The domains of the catalogs.
        texts: The translations.
        text: The identity of each translation among all texts, English ones included, (rows,).
        concept: The English text of each row, (rows,).
        language: The language of each row, (rows,).
        domain: The domain of each row, (rows,).
        held_out_domains: The domains of the programs that are held out, (domains,).
        key: A key for the draws of each row, (rows,).
        counts: What was read and what was skipped, for the record.
    """

    english: list[str]
    english_text: NDArray[np.intp]
    languages: list[Language]
    domains: list[str]
    texts: list[str]
    text: NDArray[np.intp]
    concept: NDArray[np.intp]
    language: NDArray[np.intp]
    domain: NDArray[np.intp]
    held_out_domains: NDArray[np.bool_]
    key: NDArray[np.uint64]
    counts: dict[str, object]

    def training_rows(self) -> NDArray[np.intp]:
        """The rows from programs that are not held out."""
        return np.flatnonzero(~self.held_out_domains[self.domain])

    def held_out_rows(self) -> NDArray[np.intp]:
        """The rows from held-out programs of which neither text occurs in training, in any language.

        A text that several English texts share in one language is left out too: it has no one right answer.
        """
        training = self.training_rows()
        # English texts count as read in training whether or not a cap leaves any row with them.
        seen = np.unique(np.concatenate((self.text[training], self.english_text[self.concept[training]])))
        held_out = self.held_out_domains[self.domain]
        rows = np.flatnonzero(held_out & ~np.isin(self.text, seen) & ~np.isin(self.english_text[self.concept], seen))
        query = self.text[rows] * len(self.languages) + self.language[rows]
        _, group, size = np.unique(query, return_inverse=True, return_counts=True)
        return rows[size[group] == 1]


def read_corpus(folders: Sequence[Path | str], seed: int, held_out_share: float) -> Corpus:
    """Reads the catalogs below some folders.

    Catalogs of English, of locales that are no known language and catalogs that are damaged are skipped and counted.

    Args:
        folders: Where the catalogs are.
        seed: The seed of the draws.
        held_out_share: Share of the programs to hold out, at least one.

    Raises:
        UserError: If there are too few programs to hold some out.
    """
    by_language, skipped = _by_language(find_catalogs(folders))
    domains = sorted({file.domain for files in by_language.values() for file in files})
    held_out = _held_out(domains, seed, held_out_share)
    if held_out.all() or not held_out.any():
        raise UserError(
            f"{', '.join(map(str, folders))}: message catalogs of {len(domains)} programs, too few to train on some "
            "and hold others out; install programs and language packs, or name folders with catalogs in 'locale_dirs'"
        )
    reading = _Reading(domains, held_out)
    for number, ((_, script), files) in enumerate(by_language.items()):
        reading.read_language(number, script, files)
    return reading.corpus(seed, list(by_language), skipped)


def _held_out(domains: Sequence[str], seed: int, share: float) -> NDArray[np.bool_]:
    """The domains of the programs to hold out, (domains,): those whose keys draw the smallest numbers."""
    programs = sorted({program_of(domain) for domain in domains})
    draws = keyed_bits(seed, text_key("held-out program"), np.array([text_key(name) for name in programs], np.uint64))
    count = max(1, round(share * len(programs)))
    chosen = {programs[position] for position in np.argsort(draws)[:count].tolist()}
    return np.array([program_of(domain) in chosen for domain in domains], dtype=bool)


def _by_language(files: Sequence[CatalogFile]) -> tuple[dict[Language, list[CatalogFile]], dict[str, dict[str, int]]]:
    """Catalogs by language, in order, and how many of each skipped locale there are, by reason."""
    by_language: dict[Language, list[CatalogFile]] = defaultdict(list)
    skipped: dict[str, dict[str, int]] = defaultdict(dict)
    for locale, group in groupby(files, key=lambda file: file.locale):
        found = list(group)
        try:
            tag = locale_tag(locale)
            language = (iso639_3(tag), script_of(tag))
        except ValueError:
            skipped["no known language"][locale] = len(found)
            continue
        if language[0] == "eng":
            skipped["English"][locale] = len(found)
            continue
        by_language[language] += found
    return dict(sorted(by_language.items())), dict(skipped)


class _Reading:
    """What has been read so far."""

    def __init__(self, domains: list[str], held_out: NDArray[np.bool_]) -> None:
        self._domains = domains
        self._held_out = held_out
        self._number = {name: number for number, name in enumerate(domains)}
        self._identities: dict[str, int] = {}
        self._concepts: dict[int, int] = {}
        self._concept_of: dict[str, int] = {}
        self._english: list[str] = []
        self._texts: list[str] = []
        self._columns: dict[str, list[int]] = {name: [] for name in ("text", "concept", "language", "domain")}
        self._counts: Counter[str] = Counter()
        self._damaged: list[str] = []

    def read_language(self, language: int, script: str, files: Sequence[CatalogFile]) -> None:
        """Adds the distinct translations of one language."""
        seen: set[tuple[int, int]] = set()
        # A translation that a held-out program shares with another is the other's.
        for file in sorted(files, key=lambda file: (self._held_out[self._number[file.domain]], file)):
            domain = self._number[file.domain]
            try:
                messages = list(read_messages(file.path))
            except UserError as error:
                logger.warning("%s; skipped", error)
                self._damaged.append(str(file.path))
                continue
            self._counts["catalogs"] += 1
            self._counts["messages"] += len(messages)
            for source, translation in messages:
                pair = clean_pair(source, translation, script)
                if pair is None:
                    self._counts["unusable"] += 1
                    continue
                concept, text = self._concept(pair[0]), self._identity(normalise(pair[1]))
                if (concept, text) in seen:
                    self._counts["repeated"] += 1
                    continue
                seen.add((concept, text))
                self._texts.append(pair[1])
                for name, value in zip(self._columns, (text, concept, language, domain), strict=True):
                    self._columns[name].append(value)

    def _concept(self, english: str) -> int:
        known = self._concept_of.get(english)
        if known is None:
            identity = self._identity(normalise(english))
            if identity not in self._concepts:
                self._concepts[identity] = len(self._english)
                self._english.append(english)
            known = self._concept_of[english] = self._concepts[identity]
        return known

    def _identity(self, text: str) -> int:
        return self._identities.setdefault(text, len(self._identities))

    def corpus(self, seed: int, languages: list[Language], skipped: dict[str, dict[str, int]]) -> Corpus:
        """Everything that was read."""
        columns = {name: np.array(values, dtype=np.intp) for name, values in self._columns.items()}
        hashes = np.array([text_key(text) for text in self._texts], dtype=np.uint64)
        english = np.array([text_key(text) for text in self._english], dtype=np.uint64)
        tags = np.array([text_key("-".join(language)) for language in languages], dtype=np.uint64)
        key = keyed_bits(seed, tags[columns["language"]], english[columns["concept"]], hashes)
        return Corpus(
            english=self._english,
            english_text=np.fromiter(self._concepts, dtype=np.intp, count=len(self._concepts)),
            languages=languages,
            domains=self._domains,
            texts=self._texts,
            held_out_domains=self._held_out,
            key=key,
            counts={**self._counts, "skipped_locales": skipped, "damaged": self._damaged},
            **columns,
        )
