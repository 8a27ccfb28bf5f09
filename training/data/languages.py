"""Language codes: ISO 639-3 codes and ISO 15924 scripts for BCP 47 tags, by way of ``langcodes``."""

from __future__ import annotations

import re

import langcodes

__all__ = ["iso639_3", "locale_tag", "macrolanguage", "script_of"]

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
