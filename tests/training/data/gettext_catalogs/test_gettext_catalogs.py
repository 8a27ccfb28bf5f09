"""Catalogs are found and read as programs read them, and locales name languages."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.training.data.gettext_catalogs.gettext_folders import write_catalog
from training.common.errors import UserError
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.gettext_catalogs.catalogs import LOCALE_DIRS, find_catalogs, program_of, read_messages


def write_mo(path: Path, messages: dict[str, str], charset: str = "utf-8", order: str = "<", plural: str = "") -> Path:
    """A catalog written byte by byte, with any header."""
    header = f"Content-Type: text/plain; charset={charset}\n{plural}"
    texts = [("", header), *messages.items()]
    encoded = [[text.encode(charset) for text in column] for column in zip(*texts, strict=True)]
    offset, tables, content = 28 + 16 * len(texts), b"", b""
    for column in encoded:
        for text in column:
            tables += struct.pack(f"{order}2I", len(text), offset + len(content))
            content += text + b"\0"
    start = struct.pack(f"{order}7I", 0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, offset)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + tables + content)
    return path


def test_catalogs_of_several_folders_in_order(tmp_path: Path) -> None:
    for folder, locale, domain in (("a", "fr", "two"), ("b", "de", "one"), ("a", "de", "two")):
        write_catalog(tmp_path / folder, locale, domain, [("Open", "x")])
    (tmp_path / "a/locale.alias").write_text("not a catalog")
    found = find_catalogs([tmp_path / "a", tmp_path / "b", tmp_path / "absent"])
    assert [(file.locale, file.domain) for file in found] == [("de", "one"), ("de", "two"), ("fr", "two")]


@pytest.mark.parametrize(
    ("domain", "program"),
    [("gtk30", "gtk"), ("gtk20-properties", "gtk20-properties"), ("evolution-3.44", "evolution"), ("7", "7")],
)
def test_versions_are_one_program(domain: str, program: str) -> None:
    assert program_of(domain) == program


@pytest.mark.parametrize(
    ("charset", "order"), [("utf-8", "<"), ("utf-8", ">"), ("iso-8859-2", "<"), ("UTF-16-LE", "<")]
)
def test_charsets_and_byte_orders(tmp_path: Path, charset: str, order: str) -> None:
    path = tmp_path / "x.mo"
    if charset == "UTF-16-LE":
        # The header itself can be read in no such charset, so gettext's own programs refuse it too.
        write_mo(path, {"Open": "Otevřít"}, charset)
        with pytest.raises(UserError, match=r"x\.mo"):
            list(read_messages(path))
        return
    assert list(read_messages(write_mo(path, {"Open": "Otevřít", "Šave": ""}, charset, order))) == [
        ("Open", "Otevřít"),
        ("Šave", ""),
    ]


def test_contexts_are_left_out(tmp_path: Path) -> None:
    path = write_catalog(tmp_path, "de", "x", [("Open", "Öffnen", "verb"), ("Open", "Geöffnet", "adjective")])
    assert sorted(read_messages(path)) == [("Open", "Geöffnet"), ("Open", "Öffnen")]


@pytest.mark.parametrize(
    ("header", "forms", "expected"),
    [
        ("nplurals=2; plural=(n != 1);", "eins\0viele", ["eins", "viele"]),
        ("nplurals=1; plural=0;", "一つ", ["一つ", "一つ"]),
        # Of the three Polish forms, the one for 5 and most others; of the Arabic ones, that for 11 to 99.
        (
            "nplurals=3; plural=(n==1 ? 0 : n%10>=2 && n%10<=4 && (n%100<10 || n%100>=20) ? 1 : 2);",
            "plik\0pliki\0plików",
            ["plik", "plików"],
        ),
        (
            "nplurals=6; plural=n==0 ? 0 : n==1 ? 1 : n==2 ? 2 : n%100>=3 && n%100<=10 ? 3 : n%100>=11 ? 4 : 5;",
            "a\0b\0c\0d\0e\0f",
            ["b", "e"],
        ),
        ("nplurals=2; plural=n +* 1;", "eins\0viele", ["eins", "viele"]),
        ("nplurals=2; plural=(n != 1);", "nur eins", ["nur eins", "nur eins"]),
    ],
)
def test_plurals(tmp_path: Path, header: str, forms: str, expected: list[str]) -> None:
    path = write_mo(tmp_path / "x.mo", {"one file\0many files": forms}, plural=f"Plural-Forms: {header}\n")
    assert list(read_messages(path)) == list(zip(["one file", "many files"], expected, strict=True))


def test_plural_with_context_and_no_header_of_plurals(tmp_path: Path) -> None:
    path = write_mo(tmp_path / "x.mo", {"menu\x04one file\0many files": "eins\0viele"})
    assert list(read_messages(path)) == [("one file", "eins"), ("many files", "viele")]


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:10], lambda b: b[:40], lambda b: b[:-8], lambda b: b[::-1]]
)
def test_damaged_catalog_is_named(tmp_path: Path, damage) -> None:
    path = write_catalog(tmp_path, "de", "broken", [("Open the file", "Datei öffnen")])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"broken\.mo: not a readable message catalog .*install its package again"):
        list(read_messages(path))


@pytest.mark.parametrize(
    ("locale", "tag", "code", "script"),
    [
        ("de", "de", "deu", "Latn"),
        ("pt_BR", "pt-BR", "por", "Latn"),
        ("sr", "sr", "srp", "Cyrl"),
        ("sr@latin", "sr-Latn", "srp", "Latn"),
        ("sr@ijekavianlatin", "sr-Latn", "srp", "Latn"),
        ("sr_RS@ijekavian", "sr-RS", "srp", "Cyrl"),
        ("sr_Latn", "sr-Latn", "srp", "Latn"),
        ("be@latin", "be-Latn", "bel", "Latn"),
        ("uz@cyrillic", "uz-Cyrl", "uzb", "Cyrl"),
        ("ca@valencia", "ca", "cat", "Latn"),
        ("ks@devanagari", "ks-Deva", "kas", "Deva"),
        ("zh_CN", "zh-CN", "zho", "Hans"),
        ("zh_TW", "zh-TW", "zho", "Hant"),
        ("zh_HK", "zh-HK", "zho", "Hant"),
        ("pa_PK", "pa-PK", "pan", "Arab"),
        ("nb", "nb", "nob", "Latn"),
        ("de_DE.UTF-8@euro", "de-DE", "deu", "Latn"),
        ("ckb", "ckb", "ckb", "Arab"),
        ("hsb", "hsb", "hsb", "Latn"),
        ("crh", "crh-Latn", "crh", "Latn"),
    ],
)
def test_locales(locale: str, tag: str, code: str, script: str) -> None:
    assert locale_tag(locale) == tag
    assert (iso639_3(tag), script_of(tag)) == (code, script)


@pytest.mark.parametrize("name", ["C", "POSIX", "l10n", "german", "de_de", "", "de DE"])
def test_names_that_are_no_locale(name: str) -> None:
    with pytest.raises(ValueError, match="does not name a locale"):
        locale_tag(name)


def test_installed_catalogs_are_read() -> None:
    found = find_catalogs(LOCALE_DIRS)
    if not found:
        pytest.skip("no catalogs are installed on this machine")
    # Every so many are enough: what varies is languages and the tools that compiled them.
    read = [message for file in found[:: max(1, len(found) // 50)] for message in read_messages(file.path)]
    assert read and all(source and "\0" not in source + translation for source, translation in read)
