"""Language codes: ISO 639, ISO 15924 scripts, BCP 47 tags, of ``langcodes`` and CLDR; ValueError for bad tags."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import langcodes
from babel import Locale

# The ISO 639-3 code of rows in several languages.
SEVERAL = "mul"
_LOCALE = re.compile(
    r"(?P<language>[a-z]{2,3})(?:[_-](?P<script>[A-Z][a-z]{3}))?(?:[_-](?P<region>[A-Z]{2}|[0-9]{3}))?"
    r"(?:\.[\w-]+)?(?:@(?P<modifier>\w+))?"
)
# Modifiers that name a script; others ("@valencia", "@euro", "@ijekavian") keep the usual one.
_MODIFIER_SCRIPTS = {
    **dict.fromkeys(("latin", "ijekavianlatin", "iqtelif"), "Latn"),
    **{"cyrillic": "Cyrl", "devanagari": "Deva", "arabic": "Arab", "shaw": "Shaw"},
}
# Languages whose catalogs are in another script than most texts of their speakers.
_CATALOG_SCRIPTS = {"crh": "Latn"}


def locale_tag(name: str) -> str:
    """Return the BCP 47 tag of a POSIX locale: ``"pt-BR"`` for ``"pt_BR"``, ``"sr-Latn"`` for ``"sr@latin"``."""
    match = _LOCALE.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} does not name a locale; use a name such as 'de', 'pt_BR' or 'sr@latin'")
    script = match["script"] or _MODIFIER_SCRIPTS.get((match["modifier"] or "").lower())
    script = script or _CATALOG_SCRIPTS.get(match["language"])
    return "-".join(part for part in (match["language"], script, match["region"]) if part)


@contextmanager
def _reading(tag: str) -> Iterator[None]:
    try:
        yield
    except (LookupError, ValueError) as error:
        raise ValueError(f"language tag {tag!r}: {error}; use a tag such as 'de' or 'sr_Latn'") from error


def iso639_3(tag: str) -> str:
    """Return the ISO 639-3 code of a BCP 47 tag or CLDR locale: ``"deu"`` for ``"de"``, ``"zho"`` for ``"zh_Hant"``."""
    with _reading(tag):
        return langcodes.Language.get(tag).to_alpha3()


def iso639_3_as_written(tag: str) -> str | None:
    """Return the ISO 639-3 code of a tag, not that of a preferred tag (``"tgl"`` for ``"tl"``), or None."""
    with suppress(LookupError):
        if langcodes.tag_is_valid(tag):
            return langcodes.Language.get(tag, normalize=False).to_alpha3()
    return None


def iso639_1(code: str) -> str | None:
    """Return the ISO 639-1 code of an ISO 639-3 code, without replacing it (``"tl"``, not ``"fil"``), or None."""
    # Serbo-Croatian was withdrawn in 2000, though CLDR still names it.
    return None if code == "hbs" else _two_letters().get(code)


def script_of(tag: str) -> str:
    """Return the ISO 15924 code of a language's usual script, or of the script in the tag."""
    with _reading(tag):
        script = langcodes.Language.get(tag).maximize().script
        if script is None:
            raise ValueError("no script is known; name one in the tag")
    return script


def usual_script(tag: str) -> str:
    """Return :func:`script_of`, or ``"Zyyy"`` (undetermined) for any text without a known script."""
    # For the undetermined language, langcodes returns the most common script.
    with suppress(ValueError):
        return "Zyyy" if tag == "und" else script_of(tag)
    return "Zyyy"


def macrolanguage(tag: str) -> str:
    """Return the macrolanguage of a tag: ``"ro"`` for ``"mo"``; tags with the same one may name one speech."""
    with _reading(tag):
        return langcodes.standardize_tag(tag, macro=True).split("-")[0]


def language_name(code: str) -> str:
    """Return the English name of an ISO 639-3 code, or the code if CLDR has no name for it."""
    return Locale("en").languages.get(_two_letters().get(code, code), code)


@cache
def _two_letters() -> dict[str, str]:
    """Return ISO 639-1 codes by ISO 639-3 code: CLDR names every language of ISO 639-1, each under one code."""
    codes = [code for code in Locale("en").languages if len(code) == 2]
    return {langcodes.Language.get(code, normalize=False).to_alpha3(): code for code in codes}


def languages_in_name(stem: str, among: Collection[str] = ()) -> list[str]:
    """Return the ISO 639-3 codes at the end of a file's name, as in ``mqa_ko``, ``mrtidy_korean`` or ``unpc_ar2en``.

    Only languages ``among`` these are considered. If it is empty or contains ``mul`` (several languages), all are, but
    only in the last part of the name. ``stem`` is a name without its suffix.
    """
    free = not among or SEVERAL in among
    pieces = re.sub(r"_part\d+$", "", stem).split("_")[1:]
    for piece in pieces[:-2:-1] if free else reversed(pieces):
        codes = [_code_of_word(part) for part in re.split("[-2]", piece)]
        found = list(dict.fromkeys(code for code in codes if code))
        if all(codes) and len(codes) < 3 and (free or set(found) <= set(among)):
            return found
    return []


@cache
def _tags_by_name() -> dict[str, str]:
    return {name.lower(): tag for tag, name in Locale("en").languages.items()}


def _code_of_word(word: str) -> str | None:
    tag = word if re.fullmatch("[a-z]{2,3}", word) else _tags_by_name().get(word.lower())
    return iso639_3_as_written(tag) if tag else None
