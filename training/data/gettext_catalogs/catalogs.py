"""Message catalogs of gettext as they are installed: which there are, and the pairs of texts in each.

A catalog lies at ``FOLDER/LOCALE/LC_MESSAGES/DOMAIN.mo``, where the domain is a program or a part of one. Its layout is
that of section "The Format of GNU MO Files" of the GNU gettext manual. Catalogs are read here and not by a library
because Python's ``gettext`` drops the source's plural, and Babel refuses catalogs with an unusual date in their header.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from gettext import c2py
from pathlib import Path

import numpy as np

from training.common.errors import UserError

# Where Debian, Fedora, Arch and others install catalogs, and where Ubuntu's language packs do.
LOCALE_DIRS = ("/usr/share/locale", "/usr/share/locale-langpack")
_MAGIC = 0x950412DE
_CHARSET = re.compile(r"charset=([\w-]+)", re.IGNORECASE)
_PLURAL = re.compile(r"^plural-forms:.*?plural\s*=\s*([^;\n]+)", re.IGNORECASE | re.MULTILINE)
# Numbers whose plural form stands for the plural.
_NUMBERS = range(2, 200)


@dataclass(frozen=True, order=True)
class CatalogFile:
    """One catalog: the locale of its folder, the domain of its name, and its path."""

    locale: str
    domain: str
    path: Path


def find_catalogs(folders: Sequence[Path | str]) -> list[CatalogFile]:
    """Lists the catalogs below some folders, by locale and domain; folders that are not there have none."""
    return sorted(
        CatalogFile(path.parent.parent.name, path.stem, path)
        for folder in folders
        for path in Path(folder).glob("*/LC_MESSAGES/*.mo")
    )


def program_of(domain: str) -> str:
    """Returns the program that a domain belongs to: its name without a version (``"gtk"`` for ``"gtk30"``)."""
    return re.sub(r"[-_.]?v?[0-9][0-9.]*$", "", domain.lower()) or domain.lower()


def read_messages(path: Path) -> Iterator[tuple[str, str]]:
    """Yields every translated message of a catalog as (source text, translation), as the file has them.

    Contexts are left out. Of a message with plural forms come the singular with the form for one, and the plural with
    the form that most numbers take: what a language has beside these two (a dual, say) translates no English text.

    Raises:
        UserError: If the file cannot be read or is no whole catalog.
    """
    try:
        entries = _entries(path.read_bytes())
        header = next((translation for source, translation in entries if not source), b"").decode("utf-8", "replace")
        charset = match[1] if (match := _CHARSET.search(header)) else "utf-8"
        texts = [(source.decode(charset), translation.decode(charset)) for source, translation in entries if source]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: not a readable message catalog ({error}); install its package again") from None
    one, many = _plural_forms(match[1].strip() if (match := _PLURAL.search(header)) else "n != 1")
    for source, translation in texts:
        singular, *plural = source.partition("\x04")[2].split("\0") if "\x04" in source else source.split("\0")
        if not plural:
            yield singular, translation
            continue
        forms = translation.split("\0")
        yield singular, forms[min(one, len(forms) - 1)]
        yield plural[0], forms[min(many, len(forms) - 1)]


def _entries(content: bytes) -> list[tuple[bytes, bytes]]:
    """The raw messages of a catalog.

    Raises:
        ValueError: If the content is no catalog, or tables or texts reach beyond its end.
    """
    for order in "<>":
        if len(content) >= 20 and np.frombuffer(content, f"{order}u4", 1)[0] == _MAGIC:
            break
    else:
        raise ValueError("it does not begin like one")
    count, *starts = np.frombuffer(content, f"{order}u4", 3, offset=8).tolist()
    if any(start + 8 * count > len(content) for start in starts):
        raise ValueError("it is cut short")
    sources, translations = (
        np.frombuffer(content, f"{order}u4", 2 * count, offset=start).reshape(count, 2).astype(np.int64)
        for start in starts
    )
    if any((table.sum(axis=1) > len(content)).any() for table in (sources, translations)):
        raise ValueError("it is cut short")
    return [
        (content[start : start + length], content[other : other + other_length])
        for (length, start), (other_length, other) in zip(sources.tolist(), translations.tolist(), strict=True)
    ]


@cache
def _plural_forms(expression: str) -> tuple[int, int]:
    """The form for one, and the form that most numbers from 2 on take, of a header's C expression."""
    try:
        form = c2py(expression)
        return form(1), Counter(form(number) for number in _NUMBERS).most_common(1)[0][0]
    except (ValueError, ZeroDivisionError):
        # A header that no program could use either; gettext then takes the Germanic rule.
        return 0, 1
