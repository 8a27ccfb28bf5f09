"""Message catalogs of gettext that are installed with programs, read as pairs of plain texts.

The layout is that of section "The Format of GNU MO Files" of the GNU gettext manual. No library reads it: Python's
``gettext`` drops the plural of the source, and Babel refuses catalogs with an unusual date in their header.
"""

from __future__ import annotations

import html
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from gettext import c2py
from pathlib import Path
from typing import NamedTuple

from training.common.errors import UserError
from training.data.cleaning.normalise import normalise

# Where Debian, Fedora, Arch and others install catalogs, and where Ubuntu's language packs do.
LOCALE_DIRS = ("/usr/share/locale", "/usr/share/locale-langpack")
_MAGIC = b"\xde\x12\x04\x95"
_CHARSET = re.compile(r"charset=([\w-]+)", re.IGNORECASE)
_PLURAL = re.compile(r"^plural-forms:.*?plural\s*=\s*([^;\n]+)", re.IGNORECASE | re.MULTILINE)

# Longer messages are manual pages, of which a model would read only the beginning.
_LONGEST = 300
_FEWEST_LETTERS = 4
# A character of these scripts carries as much as several letters.
_FEWEST_DENSE_LETTERS = 2
_DENSE_SCRIPTS = frozenset({"Hans", "Hant", "Hani", "Jpan", "Kore"})
# Minimum share of letters among letters and visible ASCII characters.
_LETTER_SHARE = 0.7

_CREDITS = re.compile(r"translator[-_ ]credits|(?:names|emails?|roles|credits?)[_ ](?:of|for)[_ ]translators", re.I)
_YOUR_CREDITS = frozenset({"your names", "your emails", "your email", "your name"})
_ADDRESS = re.compile(r"\w://|\bwww\.|\S@\S+\.\w|\bmailto:", re.I)
# "-f, --file" in a list of a command's options.
_COMMAND_LINE = re.compile(r"(?:^|[\s\[(,|])--?[A-Za-z]")
# ASCII only, because marks, which are not letters, are part of Indic and Thai words.
_NO_LETTER = re.compile(r"[!-@\[-`{-~]")
_WORD = re.compile(r"[^\W\d_]*[^\W\d_A-Z][^\W\d_]*")

# KDE's old "_: context\n", KDE's scripted "translation|/|script", and GLib's "context|text".
_KDE_CONTEXT = re.compile(r"\A_: ?.*?\n", re.S)
_KDE_SCRIPT = re.compile(r"\|/\|.*\Z", re.S)
_PREFIX = re.compile(r"\A[^|\n]{1,60}\|(?=[^|\s])")

_BLOCK_TAG = re.compile(
    r"</?(?:br|p|li|ul|ol|div|h\d|hr|td|th|tr|table|para|title|item|list|nl|body|html)\b[^<>]*>", re.I
)
_TAG = re.compile(r"</?(?!PRI\w+>)[A-Za-z][^<>]*>|<!--.*?-->", re.S)
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9A-Fa-f]+|[A-Za-z]\w*);")
# Equal on both sides: a model could match a text with its translation without understanding a word.
_PLACEHOLDER = re.compile(
    r"""
    %L?\d{1,2}(?![\d$.*A-Za-z]) | %\{[^{}]*\}                     # Qt and KDE
    | %[-\d]*<PRI\w+>                                            # C, <inttypes.h>
    | %(?:\d+\$|\([^()]*\))?[-+\#0'I_^]*(?:\*(?:\d+\$)?|\d+)?(?:\.(?:\*|\d+)?)?(?:hh|ll|[hlLqjzt])?[A-Za-z]
    | \$?\{[^{}\s][^{}\n]{0,40}\} | \{\}                         # Python, JavaScript, shell
    | \$[A-Za-z_]\w* | \$\d+
    """,
    re.X,
)
_CJK_ACCELERATOR = re.compile(r"\s*[(（][_&~]\w[)）]")
_EMPTY_PAIR = re.compile(
    r"\(\s*\)|（\s*）|\[\s*\]|\{\s*\}|<\s*>|«\s*»|»\s*«|‹\s*›|“\s*[”“]|„\s*[“”]|‘\s*[’‘]|‚\s*[‘’]|「\s*」|『\s*』"
    r"|《\s*》|\"\s*\"|'\s*'|`\s*['`]|''\s*''|``\s*''"
)
_LOOSE_SPACE = re.compile(r"\s+(?=[,.;:!?)\]}。、，：；！？）])|(?<=[(\[{（])\s+")
# Direction marks, byte order marks and soft hyphens; not the joiners that Persian and Indic words are written with.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_CONTROL = re.compile(r"\\[nrt](?![a-z])|[\x00-\x1f\x7f]")
_ENDS = re.compile(r"\A[\s:：,;*•·\-–—/|=)}\]]+|(?:[\s:：…,;|=/\-–—]|\.{2,})+\Z")


class CatalogFile(NamedTuple):
    """One catalog."""

    locale: str
    domain: str
    path: Path


def find_catalogs(folders: Sequence[Path | str]) -> list[CatalogFile]:
    """List the catalogs below some folders by locale and domain; a missing folder has none."""
    paths = (path for folder in folders for path in Path(folder).glob("*/LC_MESSAGES/*.mo"))
    return sorted(CatalogFile(path.parent.parent.name, path.stem, path) for path in paths)


def program_of(domain: str) -> str:
    """Return the program that a domain belongs to: its name without a version (``"gtk"`` for ``"gtk30"``)."""
    return re.sub(r"[-_.]?v?[0-9][0-9.]*$", "", domain.lower()) or domain.lower()


def read_messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the messages as (source text, translation) without context, plurals with the forms for one and for many."""
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


def clean_pair(source: str, translation: str, script: str) -> tuple[str, str] | None:
    """Clean an English message and its translation in a script (ISO 15924), or return None if they teach nothing."""
    english = _clean_source(source)
    if english is None or not translation:
        return None
    if "|" in source and _PREFIX.match(source):
        english = _clean_source(_PREFIX.sub("", source))
        # Translators keep the context or leave it out.
        if translation.count("|") >= source.count("|"):
            translation = _PREFIX.sub("", translation)
    text = clean(translation)
    if english is None or not is_plain(text, script) or normalise(english) == normalise(text):
        return None
    return english, text


# A message occurs once per language.
@lru_cache(maxsize=1 << 18)
def _clean_source(source: str) -> str | None:
    if _CREDITS.search(source) or source.strip().lower() in _YOUR_CREDITS:
        return None
    text = clean(source)
    # Names, abbreviations and identifiers are equal in every language: require a word with a lower-case letter.
    words = [word for word in _WORD.findall(text) if len(word) > 2]
    return text if words and is_plain(text, "Latn") else None


def clean(text: str) -> str:
    """Return a message without contexts, markup, placeholders, accelerators and a final ellipsis or colon."""
    # The order matters: an accelerator would hide the name of a tag or a placeholder, and an entity may encode "<".
    text = _CONTROL.sub(" ", _KDE_SCRIPT.sub("", _KDE_CONTEXT.sub("", text)))
    if "<" in text:
        text = _TAG.sub("", _BLOCK_TAG.sub(" ", text))
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    filled = _PLACEHOLDER.sub(" ", text.replace("%%", "\0")).replace("\0", "%")
    if filled != text:
        # Twice, because quotes may be in brackets.
        filled = _EMPTY_PAIR.sub(" ", _EMPTY_PAIR.sub(" ", filled))
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", _without_accelerator(filled)))
    return _ENDS.sub("", _LOOSE_SPACE.sub("", " ".join(text.split())))


def _without_accelerator(text: str) -> str:
    """Remove the mark of the key to press (``_File``, ``&File``, ``ファイル(_F)``); ``__`` and ``&&`` become one."""
    text = _CJK_ACCELERATOR.sub("", text)
    for mark in "_&":
        doubled = text.replace(mark * 2, "\0")
        # A message has one accelerator; several underscores belong to names such as FOO_BAR_BAZ.
        if doubled.count(mark) == 1:
            doubled = re.sub(rf"{mark}(?=\w)", "", doubled)
        text = doubled.replace("\0", mark)
    return text


def is_plain(text: str, script: str) -> bool:
    """Return whether a cleaned text is of usual length, mostly letters, in the script and without addresses."""
    letters = sum(map(str.isalpha, text))
    least = _FEWEST_DENSE_LETTERS if script in _DENSE_SCRIPTS else _FEWEST_LETTERS
    if letters < least or len(text) > _LONGEST or (script != "Latn" and text.isascii()):
        return False
    if letters < _LETTER_SHARE * (letters + len(_NO_LETTER.findall(text))):
        return False
    return not _ADDRESS.search(text) and not _COMMAND_LINE.search(text)
