"""Identifiers of languages and licences in the metadata of the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from training.common.languages import SEVERAL, iso639_1

# https://huggingface.co/docs/hub/repositories-licenses, as far as data is published under them.
_HUB_LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0
    isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 ms-pl odbl odc-by ofl-1.1 openrail osl-3.0 pddl postgresql unknown unlicense
    wtfpl zlib
    """.split()
)
# Identifiers that differ from SPDX.
_SPDX = {"odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl"}
# Codes that do not name one language.
SPECIAL_LANGUAGES = {SEVERAL: "multilingual", "zxx": "code"}


def hub_language(code: str) -> str:
    """Return the Hub's code of a language: ISO 639-1 if there is one, else ISO 639-3."""
    return SPECIAL_LANGUAGES.get(code) or iso639_1(code) or code


def hub_languages(codes: Iterable[str]) -> list[str]:
    """Return the Hub's codes of languages, sorted; other names are left out."""
    found = {hub_language(code) for code in codes}
    return sorted(code for code in found if re.fullmatch(r"[a-z]{2,3}", code) or code in SPECIAL_LANGUAGES.values())


def hub_licence(licence: str | None) -> str | None:
    """Return the Hub's identifier of a licence, ``unknown`` for None; None if the Hub has none for it."""
    if licence is None:
        return "unknown"
    written = re.sub(r"-(only|or-later)$", "", licence.strip().lower())
    written = _SPDX.get(written, written)
    return written if written in _HUB_LICENCES else None


def licence_metadata(licences: Iterable[str | None]) -> dict[str, Any]:
    """Return the metadata of licences: ``license`` and, if the Hub does not know one, ``license_name``."""
    licences = list(licences)
    known = sorted({found for found in map(hub_licence, licences) if found})
    others = sorted({licence for licence in licences if licence and hub_licence(licence) is None})
    identifiers = [*known, *(["other"] if others else [])]
    keys: dict[str, Any] = {"license": identifiers[0] if len(identifiers) == 1 else identifiers}
    if others:
        names = (re.sub(r"[^a-z0-9.]+", "-", each.lower()).strip("-") for each in others)
        keys["license_name"] = "-and-".join(filter(None, names)) or "other"
    return keys
