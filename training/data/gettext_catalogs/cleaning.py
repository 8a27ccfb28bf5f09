"""Plain text from the messages of programs.

Placeholders (``%s``, ``{name}``) are removed, with the quotes and brackets that contained nothing else. They are equal
on both sides, so a model could use them to match a text with its translation without understanding a word.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

from training.data.cleaning.normalise import normalise

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
    """Return a message without contexts, markup, placeholders, accelerators and a final ellipsis or colon.

    The order matters: an accelerator would hide the name of a tag or a placeholder, and an entity may encode ``<``.
    """
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
    """Return whether a cleaned text is neither very short nor very long, mostly letters and in the script.

    Texts with addresses or command-line options are excluded, as are ASCII texts in another script than Latin.
    """
    letters = sum(map(str.isalpha, text))
    least = _FEWEST_DENSE_LETTERS if script in _DENSE_SCRIPTS else _FEWEST_LETTERS
    if letters < least or len(text) > _LONGEST or (script != "Latn" and text.isascii()):
        return False
    if letters < _LETTER_SHARE * (letters + len(_NO_LETTER.findall(text))):
        return False
    return not _ADDRESS.search(text) and not _COMMAND_LINE.search(text)
