"""What the name of a published file tells about its language: `webfaq_kor`, `mqa_ko`, `mrtidy_korean`, `unpc_ar2en`."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache

import langcodes
from babel import Locale


def languages_in_name(stem: str, among: Collection[str] = ()) -> list[str]:
    """Returns the ISO 639-3 codes of the language, or the pair of languages, that a file's name ends with.

    Args:
        stem: The name without its suffix.
        among: The languages that may come out: a part of a name that means another is no language. With none given,
            or with ``mul`` (several languages) among them, any may, but only the last part of the name is looked at.

    Returns:
        One or two codes; none if the name tells no language.
    """
    free = not among or "mul" in among
    pieces = re.sub(r"_part\d+$", "", stem).split("_")[1:]
    for piece in pieces[:-2:-1] if free else reversed(pieces):
        codes = [_code(part) for part in re.split("[-2]", piece)]
        found = list(dict.fromkeys(code for code in codes if code))
        if all(codes) and len(codes) < 3 and (free or set(found) <= set(among)):
            return found
    return []


def _code(word: str) -> str | None:
    """The ISO 639-3 code that a two- or three-letter code or an English name stands for."""
    tag = word if re.fullmatch("[a-z]{2,3}", word) else _english_names().get(word.lower())
    if tag is None or not langcodes.tag_is_valid(tag):
        return None
    try:
        # As it is written: normalised, Tagalog is Filipino.
        return langcodes.Language.get(tag, normalize=False).to_alpha3()
    except LookupError:
        return None


@cache
def _english_names() -> dict[str, str]:
    return {name.lower(): tag for tag, name in Locale("en").languages.items()}
