"""Language codes: ISO 639-3 codes and ISO 15924 scripts for BCP 47 tags, by way of ``langcodes``."""

from __future__ import annotations

import re
from functools import cache

import langcodes
from babel import Locale

_LOCALE = re.compile(
    r"(?P<language>[a-z]{2,3})(?:[_-](?P<script>[A-Z][a-z]{3}))?(?:[_-](?P<region>[A-Z]{2}|[0-9]{3}))?"
    r"(?:\.[\w-]+)?(?:@(?P<modifier>\w+))?"
)
# Modifiers that name a script; the others ("@valencia", "@euro", "@ijekavian") leave the usual one.
_MODIFIER_SCRIPTS = {
    "latin": "Latn",
    "ijekavianlatin": "Latn",
    "iqtelif": "Latn",
    "cyrillic": "Cyrl",
    "devanagari": "Deva",
    "arabic": "Arab",
    "shaw": "Shaw",
}
# Languages whose catalogs are in another script than most of their speakers' texts.
_CATALOG_SCRIPTS = {"crh": "Latn"}


def locale_tag(name: str) -> str:
    """Returns the language tag of a POSIX locale, as folders of message catalogs are named.

    Args:
        name: ``language[_Script][_REGION][.charset][@modifier]``, such as ``"pt_BR"`` or ``"sr@latin"``.

    Returns:
        A BCP 47 tag: ``"pt-BR"``, ``"sr-Latn"``; ``"ca"`` for ``"ca@valencia"``.

    Raises:
        ValueError: The name has another form, as ``"C"`` has.
    """
    match = _LOCALE.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} does not name a locale; use a name such as 'de', 'pt_BR' or 'sr@latin'")
    script = match["script"] or _MODIFIER_SCRIPTS.get((match["modifier"] or "").lower())
    script = script or _CATALOG_SCRIPTS.get(match["language"])
    return "-".join(part for part in (match["language"], script, match["region"]) if part)


def iso639_3(tag: str) -> str:
    """Returns the ISO 639-3 code of a language tag.

    Args:
        tag: A BCP 47 tag or a CLDR locale identifier (``"de"``, ``"zh_Hant"``).

    Returns:
        Three lower-case letters: ``"deu"`` for ``"de"``, ``"zho"`` for ``"zh_Hant"``.

    Raises:
        ValueError: The tag is malformed, or its language has no ISO 639-3 code.
    """
    try:
        return langcodes.Language.get(tag).to_alpha3()
    except (LookupError, ValueError) as error:
        raise ValueError(f"no ISO 639-3 code for language tag {tag!r} ({error}); use a tag such as 'de'") from error


def script_of(tag: str) -> str:
    """Returns the script a language is usually written in.

    Args:
        tag: A BCP 47 tag or a CLDR locale identifier; a script named in it wins over the usual one.

    Returns:
        The ISO 15924 code: ``"Cyrl"`` for ``"sr"``, ``"Latn"`` for ``"sr_Latn"``.

    Raises:
        ValueError: The tag is malformed, or no script is known for its language.
    """
    try:
        script = langcodes.Language.get(tag).maximize().script
    except ValueError as error:
        raise ValueError(f"malformed language tag {tag!r} ({error}); use a tag such as 'de' or 'sr_Latn'") from error
    if script is None:
        raise ValueError(f"no script is known for language tag {tag!r}; name one in the tag, as in 'sr_Latn'")
    return script


def usual_script(tag: str) -> str:
    """Returns what :func:`script_of` does, and ``"Zyyy"``, the code of an undetermined script, where none is known.

    Args:
        tag: A BCP 47 tag, or any other name of a language.
    """
    try:
        # Of the undetermined language, langcodes takes the most common script.
        return "Zyyy" if tag == "und" else script_of(tag)
    except ValueError:
        return "Zyyy"


def macrolanguage(tag: str) -> str:
    """Returns the language that a tag stands for at its coarsest, without script, region or deprecated spelling.

    Two tags that meet here can name one and the same speech: ``"mo"`` and ``"ro"``, ``"tl"`` and ``"fil"``,
    ``"fa_AF"`` and ``"prs"``.

    Args:
        tag: A BCP 47 tag or a CLDR locale identifier.

    Returns:
        A language subtag, two or three lower-case letters.

    Raises:
        ValueError: The tag is malformed.
    """
    try:
        standard = langcodes.standardize_tag(tag, macro=True)
    except ValueError as error:
        raise ValueError(f"malformed language tag {tag!r} ({error}); use a tag such as 'de' or 'sr_Latn'") from error
    return standard.split("-")[0]


def iso639_1(code: str) -> str | None:
    """Returns the two letters of ISO 639-1 for a code of ISO 639-3, as it is written: ``"tl"``, not ``"fil"``.

    Args:
        code: Three lower-case letters.

    Returns:
        Two letters, or None where ISO 639-1 has none.
    """
    # Withdrawn in 2000, though CLDR still names it: Serbo-Croatian.
    return None if code == "hbs" else _two_letters().get(code)


def language_name(code: str) -> str:
    """Returns the English name of a language, or the code if CLDR has no name for it.

    Args:
        code: An ISO 639-3 code.
    """
    names = Locale("en").languages
    return names.get(_two_letters().get(code, code), code)


@cache
def _two_letters() -> dict[str, str]:
    # CLDR names every language of ISO 639-1, each under one code.
    codes = [code for code in Locale("en").languages if len(code) == 2]
    return {langcodes.Language.get(code, normalize=False).to_alpha3(): code for code in codes}


# Of rows whose languages are not told apart; ISO 639-3 for several languages.
SEVERAL = "mul"
