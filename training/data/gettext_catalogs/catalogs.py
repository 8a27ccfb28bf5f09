"""Message catalogs of gettext that are installed with programs, read into one table of translations.

A catalog lies at ``FOLDER/LOCALE/LC_MESSAGES/DOMAIN.mo``, where the domain is a program or a part of one. Its layout is
that of section "The Format of GNU MO Files" of the GNU gettext manual. No library reads it, because Python's
``gettext`` drops the plural of the source, and Babel refuses catalogs with an unusual date in their header.
"""

from __future__ import annotations

import logging
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from gettext import c2py
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.cldr.draws import Keys, Mask, Rows
from training.data.cleaning.normalise import normalise
from training.data.gettext_catalogs.cleaning import clean_pair

logger = logging.getLogger(__name__)

# Where Debian, Fedora, Arch and others install catalogs, and where Ubuntu's language packs do.
LOCALE_DIRS = ("/usr/share/locale", "/usr/share/locale-langpack")
_MAGIC = b"\xde\x12\x04\x95"
_CHARSET = re.compile(r"charset=([\w-]+)", re.IGNORECASE)
_PLURAL = re.compile(r"^plural-forms:.*?plural\s*=\s*([^;\n]+)", re.IGNORECASE | re.MULTILINE)


class CatalogFile(NamedTuple):
    """One catalog: the locale of its folder, the domain of its name, and its path."""

    locale: str
    domain: str
    path: Path


def find_catalogs(folders: Sequence[Path | str]) -> list[CatalogFile]:
    """List the catalogs below some folders by locale and domain; a missing folder has none."""
    return sorted(
        CatalogFile(path.parent.parent.name, path.stem, path)
        for folder in folders
        for path in Path(folder).glob("*/LC_MESSAGES/*.mo")
    )


def program_of(domain: str) -> str:
    """Return the program that a domain belongs to: its name without a version (``"gtk"`` for ``"gtk30"``)."""
    return re.sub(r"[-_.]?v?[0-9][0-9.]*$", "", domain.lower()) or domain.lower()


def read_messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield every translated message of a catalog as (source text, translation), without its context.

    A message with plural forms gives two pairs: the singular with the form for one, and the plural with the form that
    most numbers take. Other forms, such as a dual, translate no English text.
    """
    try:
        entries = _entries(path.read_bytes())
        header = next((translation for source, translation in entries if not source), b"").decode("utf-8", "replace")
        charset = match[1] if (match := _CHARSET.search(header)) else "utf-8"
        texts = [(source.decode(charset), translation.decode(charset)) for source, translation in entries if source]
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise UserError(f"{path}: not a readable message catalog ({error}); install its package again") from None
    one, many = _plural_forms(match[1].strip() if (match := _PLURAL.search(header)) else "n != 1")
    for source, translation in texts:
        singular, *plural = source.rpartition("\x04")[2].split("\0")
        if plural:
            forms = translation.split("\0")
            yield singular, forms[min(one, len(forms) - 1)]
            yield plural[0], forms[min(many, len(forms) - 1)]
        else:
            yield singular, translation


def _entries(content: bytes) -> list[tuple[bytes, bytes]]:
    """Return the raw messages of a catalog; raise ValueError or struct.error if it is none or incomplete."""
    order = "<" if content[:4] == _MAGIC else ">"
    if content[:4] not in (_MAGIC, _MAGIC[::-1]):
        raise ValueError("it does not begin like one")
    count, *starts = struct.unpack_from(f"{order}3I", content, 8)
    columns = []
    for start in starts:
        numbers = struct.unpack_from(f"{order}{2 * count}I", content, start)
        spans = list(zip(numbers[1::2], numbers[::2], strict=True))
        if any(first + length > len(content) for first, length in spans):
            raise ValueError("it is cut short")
        columns.append([content[first : first + length] for first, length in spans])
    return list(zip(*columns, strict=True))


@cache
def _plural_forms(expression: str) -> tuple[int, int]:
    """Return the form for one and the form that most numbers from 2 on take, given the C expression of a header."""
    try:
        form = c2py(expression)
        return form(1), Counter(map(form, range(2, 200))).most_common(1)[0][0]
    except (ValueError, ZeroDivisionError):
        # gettext falls back to the Germanic rule, too.
        return 0, 1


@dataclass(frozen=True, eq=False)
class Corpus:
    """Distinct texts: the translations in the order of their languages, then the English source texts.

    Texts are the same if they differ only in case, punctuation and spacing. A concept is an English text with its
    translations.
    """

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
        """Return the translations to train on, and those of held-out programs.

        Held out are those of which neither side occurs in training, in any language. A text that translates several
        English texts in one language is left out, too: it has no single right answer.
        """
        held_out = self.held_out_domains[self.domain]
        training, rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        # English texts count as seen in training even if a cap leaves no row with them.
        seen = np.unique(self.text[np.concatenate((training, self.english(training)))])
        rows = rows[~np.isin(self.text[rows], seen) & ~np.isin(self.text[self.english(rows)], seen)]
        query = self.text[rows] * len(self.languages) + self.language[rows]
        _, group, size = np.unique(query, return_inverse=True, return_counts=True)
        return training, rows[size[group] == 1]


def read_corpus(folders: Sequence[Path | str], seed: int, held_out_share: float) -> Corpus:
    """Read the catalogs below some folders; hold out a share of the programs, at least one, drawn by the seed.

    Catalogs of English, of unknown languages and damaged catalogs are skipped and counted.
    """
    by_language, skipped = _by_language(folders)
    domains = sorted({file.domain for files in by_language.values() for file in files})
    held_out = _held_out(domains, seed, held_out_share)
    if held_out.all() or not held_out.any():
        raise UserError(
            f"{', '.join(map(str, folders))}: message catalogs of {len(domains)} programs, too few to train on some "
            "and hold others out; install programs and language packs, or name folders with catalogs in 'locale_dirs'"
        )
    numbers = {name: number for number, name in enumerate(domains)}
    rows: list[tuple[str, str, int, int]] = []
    catalogs, messages, damaged = 0, 0, []
    for language, ((_, script), files) in enumerate(by_language.items()):
        # A translation that a held-out program shares with another one counts as that of the other one.
        for file in sorted(files, key=lambda file: (held_out[numbers[file.domain]], file)):
            try:
                read = list(read_messages(file.path))
            except UserError as error:
                logger.warning("%s; skipped", error)
                damaged.append(str(file.path))
                continue
            catalogs, messages = catalogs + 1, messages + len(read)
            pairs = (pair for message in read if (pair := clean_pair(*message, script)))
            rows += [(*pair, language, numbers[file.domain]) for pair in pairs]
    frame = pd.DataFrame(rows, columns=["english", "text", "language", "domain"])
    usable, sides = len(frame), frame[["english", "text"]]
    form_of = {text: normalise(text) for side in sides for text in frame[side].unique()}
    forms, _ = pd.factorize(pd.concat([frame[side].map(form_of) for side in sides]))
    frame["english_form"], frame["form"] = np.split(forms, 2)
    frame["concept"], _ = pd.factorize(frame["english_form"])
    # The first spelling of each concept, and of each translation of it in one language.
    english, frame = frame.drop_duplicates("concept"), frame.drop_duplicates(["language", "form", "concept"])
    text, concept, language, domain = frame[["form", "concept", "language", "domain"]].to_numpy(dtype=np.intp).T
    tags = _text_keys("-".join(language) for language in by_language)
    key = keyed_bits(seed, tags[language], _text_keys(english["english"])[concept], _text_keys(frame["text"]))
    counts = {"catalogs": catalogs, "messages": messages, "unusable": messages - usable}
    return Corpus(
        texts=[*frame["text"], *english["english"]],
        text=np.concatenate((text, english["english_form"].to_numpy(dtype=np.intp))),
        concept=np.concatenate((concept, np.arange(len(english)))),
        language=np.concatenate((language, np.full(len(english), len(by_language)))),
        domain=domain,
        key=key,
        languages=[*by_language, ("eng", "Latn")],
        domains=domains,
        held_out_domains=held_out,
        counts={**counts, "repeated": usable - len(frame), "skipped_locales": skipped, "damaged": damaged},
    )


def _text_keys(texts: Iterable[str]) -> Keys:
    return np.array([text_key(text) for text in texts], dtype=np.uint64)


def _held_out(domains: Sequence[str], seed: int, share: float) -> Mask:
    """Return which domains to hold out, (domains,): those of the programs whose keys draw the smallest numbers."""
    programs = sorted({program_of(domain) for domain in domains})
    draws = keyed_bits(seed, text_key("held-out program"), _text_keys(programs))
    chosen = {programs[position] for position in np.argsort(draws)[: max(1, round(share * len(programs)))].tolist()}
    return np.array([program_of(domain) in chosen for domain in domains], dtype=bool)


def _by_language(folders: Sequence[Path | str]) -> tuple[dict[tuple[str, str], list[CatalogFile]], dict[str, Any]]:
    """Return the catalogs by language and script, in order, and the number of each skipped locale by reason."""
    by_language, skipped = defaultdict(list), defaultdict(Counter)
    for file in find_catalogs(folders):
        try:
            tag = locale_tag(file.locale)
            language = (iso639_3(tag), script_of(tag))
        except ValueError:
            skipped["no known language"][file.locale] += 1
            continue
        if language[0] == "eng":
            skipped["English"][file.locale] += 1
        else:
            by_language[language].append(file)
    return dict(sorted(by_language.items())), skipped
