"""Translation data from installed message catalogs, in the published format, with whole programs held out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.feature_extraction.text import TfidfVectorizer

from training.common.errors import UserError
from training.common.keyed import keyed_bits, keyed_uniform, text_key
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.builders import builder
from training.data.cldr.draws import Keys, Mask, Rows, first_distinct, for_purpose, grouped
from training.data.cleaning.normalise import normalise
from training.data.gettext_catalogs.messages import LOCALE_DIRS, clean_pair, find_catalogs, program_of, read_messages
from training.data.manifest import MANIFEST, write_manifest
from training.data.published import ROW_GROUP_ROWS, rows_table, write_parquet

logger = logging.getLogger(__name__)

# Programs translate under their own licences, most of them the GPL or the LGPL.
LICENCE = "each program's own"
# Increase it when the same options would build other data than before.
_FORMAT = 2
_MORE_PROGRAMS = "install more programs and language packs, or name more folders in 'locale_dirs'"
_ROWS_AT_ONCE = 5 * ROW_GROUP_ROWS
# Other languages drawn for a message before it is given up.
_PASSAGES_DRAWN = 8
# Neighbours kept of each message per negative: the negatives of its translations differ, and all of them are hard.
_NEIGHBOURS_PER_NEGATIVE = 2
# Besides shared words, messages of similar length are harder to tell apart.
_LENGTH_WEIGHT = 0.1
# Elements of one matrix of similarities or of candidates, to limit its memory to some tens of megabytes.
_CHUNK_ELEMENTS = 4_000_000


@builder("gettext", format=_FORMAT)
def build_gettext(
    folder: Path,
    *,
    seed: int = 0,
    locale_dirs: Sequence[str] = LOCALE_DIRS,
    held_out_share: float = 0.1,
    num_negatives: int = 8,
    rows_per_language: int = 10_000,
    pairs_per_language: int = 2_000,
    held_out_per_language: int = 200,
) -> dict[str, Any]:
    """Build training sources, their manifest and the messages of held-out programs from installed catalogs.

    The folder contains ``manifest.yaml``; ``gettext_translation.parquet`` (a message and its English source) and
    ``gettext_pairs.parquet`` (a message in two languages), sorted by language, with columns ``lang``, ``script`` and
    ``domain``; ``held_out.parquet`` (query, passage, lang, script, domain) from programs that no source uses;
    ``candidates.parquet`` (passage: every English text of these programs); and ``build.json``. No held-out text occurs
    in any source. A finished build is kept even if catalogs were installed or removed since.

    Catalogs are ``FOLDER/LOCALE/LC_MESSAGES/DOMAIN.mo`` in ``locale_dirs``. At least one program is held out. Where
    there are more rows than asked for per language, they are drawn evenly over programs.
    """
    corpus, folders = read_corpus(locale_dirs, seed, held_out_share), ", ".join(locale_dirs)
    training, held_out = corpus.split()
    if not len(training) or not len(held_out):
        there = f"{len(training)} messages to train on and {len(held_out)} to hold out"
        raise UserError(f"{folders}: {there}; {_MORE_PROGRAMS}")
    negatives = Negatives(corpus, training, num_negatives)
    translated = _evenly(corpus, training, rows_per_language)
    paired, others = _in_other_languages(corpus, training, _evenly(corpus, training, pairs_per_language))
    kinds = {
        "gettext_translation": ("English negatives", "the English translation", translated, corpus.english(translated)),
        "gettext_pairs": ("negatives of one language", "the translation into another language", paired, others),
    }
    entries, counts = [], {}
    for name, (purpose, wanted, rows, passages) in kinds.items():
        drawn = negatives.draw(rows, passages, purpose)
        rows, passages, drawn = (each[drawn[:, 0] >= 0] for each in (rows, passages, drawn))
        counts[name] = write_parquet(folder / f"{name}.parquet", _tables(corpus, rows, passages, drawn))
        if counts[name]:
            languages = np.unique(corpus.language[np.concatenate((rows, passages))]).tolist()
            entry = {"name": name, "files": [f"{name}.parquet"], "task_type": "retrieval", "symmetric": True}
            codes = sorted({corpus.languages[language][0] for language in languages})
            entries.append({**entry, "instruction": f"Retrieve {wanted}.", "languages": codes, "licence": LICENCE})
    if not entries:
        fault = f"no message has {num_negatives} others beside it; lower 'num_negatives'"
        raise UserError(f"{folders}: {fault}, or {_MORE_PROGRAMS}")
    write_manifest(folder / MANIFEST, entries)
    chosen = _evenly(corpus, held_out, held_out_per_language)
    write_parquet(folder / "held_out.parquet", _tables(corpus, chosen, corpus.english(chosen)))
    candidates = pa.array(_texts(corpus, np.unique(corpus.english(held_out))), type=pa.string())
    write_parquet(folder / "candidates.parquet", [pa.table({"passage": candidates})])
    return {
        **corpus.counts,
        "translations": len(corpus.domain),
        "languages": len({code for code, _ in corpus.languages[:-1]}),
        "held_out_domains": [corpus.domains[domain] for domain in np.flatnonzero(corpus.held_out_domains).tolist()],
        "rows": counts,
        "held_out": len(chosen),
    }


@dataclass(frozen=True, eq=False)
class Corpus:
    """Distinct texts: the translations by language, then the English texts, each of them a concept."""

    texts: list[str]
    text: Rows  # number of the normal form of each text
    concept: Rows  # of each text
    language: Rows  # of each text
    domain: Rows  # of each translation
    key: Keys  # of each translation, for draws
    languages: list[tuple[str, str]]  # (ISO 639-3 code, ISO 15924 script); English is last
    domains: list[str]
    held_out_domains: Mask  # whether the program of each domain is held out
    counts: dict[str, object]  # what was read and what was skipped, for build.json

    def english(self, rows: Rows) -> Rows:
        """Return the English texts of the concepts of some texts."""
        return len(self.domain) + self.concept[rows]

    def split(self) -> tuple[Rows, Rows]:
        """Return the translations to train on, and those of held-out programs without a side that training has."""
        held_out = self.held_out_domains[self.domain]
        training, rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        # English texts count as seen in training even if a cap leaves no row with them.
        seen = np.unique(self.text[np.concatenate((training, self.english(training)))])
        rows = rows[~np.isin(self.text[rows], seen) & ~np.isin(self.text[self.english(rows)], seen)]
        # Nor a text of several English ones in one language: it has no single right answer.
        query = self.text[rows] * len(self.languages) + self.language[rows]
        _, group, size = np.unique(query, return_inverse=True, return_counts=True)
        return training, rows[size[group] == 1]


def read_corpus(folders: Sequence[Path | str], seed: int, held_out_share: float) -> Corpus:
    """Read the catalogs below some folders, but for English, unknown and damaged ones; hold out drawn programs."""
    rows: list[tuple[str, str, tuple[str, str], str]] = []
    known, skipped, catalogs, messages, damaged = set(), Counter(), 0, 0, []
    for file in find_catalogs(folders):
        try:
            tag = locale_tag(file.locale)
            language = (iso639_3(tag), script_of(tag))
        except ValueError:
            language = ("eng", "")
        if language[0] == "eng":
            skipped[file.locale] += 1
            continue
        known.add((language, file.domain))
        try:
            read = list(read_messages(file.path))
        except UserError as error:
            logger.warning("%s; skipped", error)
            damaged.append(str(file.path))
            continue
        catalogs, messages = catalogs + 1, messages + len(read)
        pairs = (pair for message in read if (pair := clean_pair(*message, language[1])))
        rows += [(*pair, language, file.domain) for pair in pairs]
    languages, domains = (sorted({each[column] for each in known}) for column in (0, 1))
    held_out = _held_out(domains, seed, held_out_share)
    if held_out.all() or not held_out.any():
        fault = f"message catalogs of {len(domains)} programs, too few to train on some and hold others out"
        raise UserError(f"{', '.join(map(str, folders))}: {fault}; {_MORE_PROGRAMS}")
    frame = pd.DataFrame(rows, columns=["english", "text", "language", "domain"])
    for column, names in (("language", languages), ("domain", domains)):
        frame[column] = frame[column].map({name: number for number, name in enumerate(names)})
    # A translation that a held-out program shares with another one counts as that of the other one.
    frame["held_out"] = held_out[frame["domain"].to_numpy(dtype=np.intp)]
    frame = frame.sort_values(["language", "held_out"], kind="stable", ignore_index=True)
    sides = ["english", "text"]
    form_of = {text: normalise(text) for side in sides for text in frame[side].unique()}
    forms, _ = pd.factorize(pd.concat([frame[side].map(form_of) for side in sides]))
    frame["english_form"], frame["form"] = np.split(forms, 2)
    frame["concept"], _ = pd.factorize(frame["english_form"])
    # The first spelling of each concept, and of each translation of it in one language.
    english, frame = frame.drop_duplicates("concept"), frame.drop_duplicates(["language", "form", "concept"])
    text, concept, language, domain = frame[["form", "concept", "language", "domain"]].to_numpy(dtype=np.intp).T
    tags = _text_keys("-".join(language) for language in languages)
    key = keyed_bits(seed, tags[language], _text_keys(english["english"])[concept], _text_keys(frame["text"]))
    return Corpus(
        texts=[*frame["text"], *english["english"]],
        text=np.concatenate((text, english["english_form"].to_numpy(dtype=np.intp))),
        concept=np.concatenate((concept, np.arange(len(english)))),
        language=np.concatenate((language, np.full(len(english), len(languages)))),
        domain=domain,
        key=key,
        languages=[*languages, ("eng", "Latn")],
        domains=domains,
        held_out_domains=held_out,
        counts={"catalogs": catalogs, "messages": messages, "skipped_locales": skipped, "damaged": damaged},
    )


def _text_keys(texts: Iterable[str]) -> Keys:
    return np.array([text_key(text) for text in texts], dtype=np.uint64)


def _held_out(domains: Sequence[str], seed: int, share: float) -> Mask:
    """Return which domains to hold out, (domains,): those of the programs whose keys draw the smallest numbers."""
    programs = sorted({program_of(domain) for domain in domains})
    draws = keyed_bits(seed, text_key("held-out program"), _text_keys(programs))
    chosen = {programs[position] for position in np.argsort(draws)[: max(1, round(share * len(programs)))].tolist()}
    return np.array([program_of(domain) in chosen for domain in domains], dtype=bool)


def _tables(corpus: Corpus, rows: Rows, passages: Rows, negatives: Rows | None = None) -> Iterator[pa.Table]:
    """Yield queries, passages, negatives (rows, negatives) and the language, script and domain of the queries."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        languages = [corpus.languages[language] for language in corpus.language[rows[part]].tolist()]
        yield rows_table(
            _texts(corpus, rows[part]),
            _texts(corpus, passages[part]),
            [] if negatives is None else [_texts(corpus, column) for column in negatives[part].T],
            lang=[code for code, _ in languages],
            script=[script for _, script in languages],
            domain=[corpus.domains[domain] for domain in corpus.domain[rows[part]].tolist()],
        )


def _texts(corpus: Corpus, rows: Rows) -> list[str]:
    return [corpus.texts[row] for row in rows.tolist()]


def _in_other_languages(corpus: Corpus, pool: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """Return the rows that have a translation in another language and other words, and one of these from ``pool``."""
    ordered = pool[np.argsort(corpus.concept[pool], kind="stable")]
    start = np.searchsorted(corpus.concept[ordered], corpus.concept[rows])
    size = np.searchsorted(corpus.concept[ordered], corpus.concept[rows], side="right") - start
    draws = keyed_bits(for_purpose(corpus.key[rows], "passage")[:, None], np.arange(_PASSAGES_DRAWN))
    found = ordered[start[:, None] + (draws % size[:, None].astype(np.uint64)).astype(np.intp)]
    other = corpus.language[found] != corpus.language[rows][:, None]
    other &= corpus.text[found] != corpus.text[rows][:, None]
    first = np.take_along_axis(found, other.argmax(axis=1)[:, None], axis=1)[:, 0]
    return rows[other.any(axis=1)], first[other.any(axis=1)]


def _evenly(corpus: Corpus, rows: Rows, most: int) -> Rows:
    """Return at most ``most`` rows per language, in order: one of each domain, then a second one, and so on."""
    # Programs differ in size by a factor of a thousand: a uniform draw would be one of few programs.
    columns = {"language": corpus.language[rows], "domain": corpus.domain[rows], "key": corpus.key[rows]}
    frame = pd.DataFrame(columns, index=rows).sort_values("key")
    frame["nth"] = frame.groupby(["language", "domain"]).cumcount()
    frame = frame.sort_values(["nth", "key"])
    return np.sort(frame.index[frame.groupby("language").cumcount() < most].to_numpy())


class Negatives:
    """Draws hard negatives: other messages of the program that share words, and no translation in any language.

    ``rows`` are the translations that may appear in training.
    """

    def __init__(self, corpus: Corpus, rows: Rows, count: int) -> None:
        self._corpus, self._count = corpus, count
        # Number of texts drawn from any program, for programs with few messages.
        self._spare = 2 * count + 8
        # Pairs of concepts with a translation in common, as ``first * len(corpus.concept) + second``.
        frame = pd.DataFrame({name: getattr(corpus, name)[rows] for name in ("language", "text", "concept")})
        frame = frame[frame.duplicated(["language", "text"], keep=False)]
        pairs = frame.merge(frame, on=["language", "text"])[["concept_x", "concept_y"]].to_numpy()
        self._same_meaning = np.unique(pairs[:, 0] * len(corpus.concept) + pairs[:, 1])
        self._neighbours = _neighbours(corpus, rows, count * _NEIGHBOURS_PER_NEGATIVE)
        texts = np.concatenate((rows, np.unique(corpus.english(rows))))
        self._of_language = dict(grouped(corpus.language[texts], texts))

    def draw(self, rows: Rows, passages: Rows, purpose: str) -> Rows:
        """Return texts in the languages of the passages, (rows, count); all -1 for a row with too few."""
        corpus, text, concept = self._corpus, self._corpus.text, self._corpus.concept
        drawn = np.full((len(rows), self._count), -1, dtype=np.intp)
        step = max(1, _CHUNK_ELEMENTS // (self._neighbours.shape[1] + self._spare))
        for language, positions in grouped(corpus.language[passages], np.arange(len(rows))):
            pool = self._of_language[language]
            text_of = np.full(concept.max() + 1, -1, dtype=np.intp)
            # The first text of each concept.
            text_of[concept[pool[::-1]]] = pool[::-1]
            for part in np.split(positions, range(step, len(positions), step)):
                keys = for_purpose(corpus.key[rows[part]], purpose)
                near = self._neighbours[concept[rows[part]]]
                order = np.argsort(keyed_bits(keys[:, None], np.arange(near.shape[1])), axis=1)
                near = np.take_along_axis(near, order, axis=1)
                draws = keyed_bits(for_purpose(keys, "anywhere")[:, None], np.arange(self._spare))
                anywhere = pool[(draws % np.uint64(len(pool))).astype(np.intp)]
                items = np.concatenate((np.where(near >= 0, text_of[near], -1), anywhere), axis=1)
                row, passage = rows[part][:, None], passages[part][:, None]
                valid = (items >= 0) & (text[items] != text[row]) & (text[items] != text[passage])
                valid &= (concept[items] != concept[row]) & (text[corpus.english(items)] != text[row])
                valid &= ~np.isin(concept[row] * len(concept) + concept[items], self._same_meaning)
                drawn[part] = first_distinct(items, valid, text, self._count)
        return drawn


def _neighbours(corpus: Corpus, rows: Rows, count: int) -> Rows:
    """Return for each concept those of its (first) domain that share most words, (concepts, count), padded with -1."""
    concepts, first = np.unique(corpus.concept[rows], return_index=True)
    texts = _texts(corpus, corpus.english(rows[first]))
    vectors = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, dtype=np.float64).fit_transform(texts)
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    # Breaks ties in the same way on every machine; too small to matter otherwise.
    unique = 1e-9 * keyed_uniform(np.array([text_key(text) for text in texts], dtype=np.uint64))
    nearest = np.full((corpus.concept.max() + 1, count), -1, dtype=np.intp)
    for _, members in grouped(corpus.domain[rows[first]], np.arange(len(concepts))):
        kept = min(count, len(members) - 1)
        step = max(1, _CHUNK_ELEMENTS // len(members))
        transposed = vectors[members].T.tocsc()
        for part in np.split(members, range(step, len(members), step)) if kept else ():
            similarity = (vectors[part] @ transposed).toarray()
            shorter = np.minimum(lengths[part][:, None], lengths[members])
            longer = np.maximum(lengths[part][:, None], lengths[members])
            similarity += _LENGTH_WEIGHT * shorter / longer + unique[members]
            similarity[part[:, None] == members] = -1.0
            # A partition finds the nearest ones, but not in order.
            best = np.argpartition(-similarity, kept - 1, axis=1)[:, :kept]
            order = np.argsort(-np.take_along_axis(similarity, best, axis=1), axis=1)
            nearest[concepts[part], :kept] = concepts[members[np.take_along_axis(best, order, axis=1)]]
    return nearest
