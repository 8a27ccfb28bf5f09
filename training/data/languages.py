"""Language codes: ISO 639-3 codes and ISO 15924 scripts for BCP 47 tags, by way of ``langcodes``."""

from __future__ import annotations

import langcodes

__all__ = ["iso639_3", "macrolanguage", "script_of"]


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
