"""Folders of catalogs for tests, written from the names in CLDR."""

from __future__ import annotations

from pathlib import Path

from babel import Locale
from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo

# Related and unrelated languages, six scripts, and two languages in two scripts each.
LOCALES = ["de", "hi", "ja", "pt_BR", "sr", "sr@latin", "zh_CN", "zh_TW"]
PROGRAMS = {"lands": "territories", "tongues": "languages", "writing3": "scripts", "money": "currencies"}
# Babel knows a script by its code.
_CLDR = {"sr@latin": "sr_Latn", "zh_CN": "zh_Hans_CN", "zh_TW": "zh_Hant_TW"}


def write_catalog(folder: Path, locale: str, domain: str, messages: list[tuple], **header: str) -> Path:
    """Write one catalog; a message is (source, translation), or (source, translation, context)."""
    catalog = Catalog(locale=None, fuzzy=False)
    for source, translation, *context in messages:
        catalog.add(source, translation, context=context[0] if context else None)
    path = folder / locale / "LC_MESSAGES" / f"{domain}.mo"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_mo(file, catalog)
    return path


def write_catalogs(folder: Path, locales: list[str] = LOCALES) -> Path:
    """Write one program's catalog for each kind of name, in each locale; every fifth name is a menu entry."""
    english = Locale("en")
    for locale in locales:
        names = Locale.parse(_CLDR.get(locale, locale))
        for domain, kind in PROGRAMS.items():
            translated = getattr(names, kind)
            messages = [
                (f"_{source}…", f"_{translated[code]}…") if number % 5 == 0 else (source, translated[code])
                for number, (code, source) in enumerate(sorted(getattr(english, kind).items()))
                if code in translated
            ]
            write_catalog(folder, locale, domain, messages)
    return folder
