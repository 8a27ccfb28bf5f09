"""Catalogs are found and read as programs read them, and their messages become plain text."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.training.data.gettext_catalogs.gettext_folders import write_catalog
from training.common.errors import UserError
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.gettext_catalogs.catalogs import LOCALE_DIRS, find_catalogs, program_of, read_messages
from training.data.gettext_catalogs.cleaning import clean, clean_pair, is_plain


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


@pytest.mark.parametrize(("charset", "order"), [("utf-8", "<"), ("utf-8", ">"), ("iso-8859-2", "<")])
def test_charsets_and_byte_orders(tmp_path: Path, charset: str, order: str) -> None:
    messages = {"Open": "Otevřít", "Šave": ""}
    assert list(read_messages(write_mo(tmp_path / "x.mo", messages, charset, order))) == list(messages.items())


def test_a_charset_that_its_own_header_is_not_readable_in(tmp_path: Path) -> None:
    # The programs of gettext refuse it too.
    path = write_mo(tmp_path / "x.mo", {"Open": "Otevřít"}, "UTF-16-LE")
    with pytest.raises(UserError, match=r"x\.mo"):
        list(read_messages(path))


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


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Copied %d of %-10.*s files", "Copied of files"),  # C
        ("%1$s sent %2$.1f bytes", "sent bytes"),
        ("Wrote %<PRIu64> bytes", "Wrote bytes"),
        ("Found %(count)d items", "Found items"),  # Python
        ("Hello {name}, {0:.2f} and {}", "Hello, and"),
        ("Page %1 of %L2", "Page of"),  # Qt and KDE
        ("Delete %n files", "Delete files"),
        ("Drive %{volume} is full", "Drive is full"),
        ("Saved in $HOME and ${folder}", "Saved in and"),  # shell
        ("100%% done", "100% done"),
        ("50% of all", "50% of all"),
        ("At %I:%M %p today", "At: today"),
        ("Could not open “%s” (%s)", "Could not open"),  # what held a placeholder goes with it
        ("`%s' not found", "not found"),
        ("「%s」を開けません", "を開けません"),
        ("<b>Warning</b>: no <a href='x'>disk</a>", "Warning: no disk"),  # markup
        ("One<br/>two<p>three</p>", "One two three"),
        ("Fish &amp; chips &#8211; now", "Fish & chips – now"),
        ("_File", "File"),  # accelerators
        ("Pre_ferences", "Preferences"),
        ("&Open", "Open"),
        ("Un&do", "Undo"),
        ("&copy here", "copy here"),
        ("ファイル(_F)", "ファイル"),
        ("打开（&O）...", "打开"),
        ("Save && quit", "Save & quit"),
        ("black & white", "black & white"),
        ("unset MY_OWN_VARIABLE first", "unset MY_OWN_VARIABLE first"),
        ("Save As…", "Save As"),  # ends
        ("Searching . . .\tplease wait...", "Searching... please wait"),
        ("Name:", "Name"),
        ("名前：", "名前"),
        ("• first item", "first item"),
        ("  two\n lines\\n here ", "two lines here"),  # white space
        ("a\u200eb\u00adc\ufeff", "abc"),
        ("کتاب\u200cخانه", "کتاب\u200cخانه"),  # but not the joiners of Persian
        ("Cafe\u0301", "Café"),
        ("_: verb\nOpen", "Open"),  # contexts
        ("Öffnen|/|$[gen]", "Öffnen"),
    ],
)
def test_clean(message: str, expected: str) -> None:
    assert clean(message) == expected


@pytest.mark.parametrize(
    ("source", "translation", "script", "expected"),
    [
        ("_Open the file…", "Datei _öffnen …", "Latn", ("Open the file", "Datei öffnen")),
        ("Column|Width", "Breite", "Latn", ("Width", "Breite")),
        ("Column|Width", "Column|Breite", "Latn", ("Width", "Breite")),
        ("File", "文件", "Hans", ("File", "文件")),
        ("Open the file", "", "Latn", None),  # untranslated
        ("Open the file", "_Open the FILE.", "Latn", None),
        ("Open the file", "Open a file", "Cyrl", None),
        ("Go", "Gehe zu", "Latn", None),  # short
        ("File", "ไฟ", "Thai", None),
        ("%s: %d", "%s: %d", "Latn", None),
        ("Size 10.5 x 12.7, 300 / 400", "Maß 10,5 x 12,7, 300 / 400", "Latn", None),  # mostly no letters
        ("Visit our site at https://example.org", "Mehr auf https://example.org", "Latn", None),
        ("Report bugs to bugs@example.org", "Fehler an bugs@example.org", "Latn", None),
        ("-f, --file   read the file", "-f, --file   Datei lesen", "Latn", None),
        ("translator-credits", "Ada Lovelace, Emil Post", "Latn", None),
        ("NAME OF TRANSLATORS", "Ada Lovelace", "Latn", None),
        ("Your names", "Ada Lovelace", "Latn", None),
        ("HTTP/1.1 GNOME", "HTTP/1.1 (GNOME)", "Latn", None),  # no word of a language
        ("word " * 100, "Wort " * 100, "Latn", None),
    ],
)
def test_clean_pair(source: str, translation: str, script: str, expected: tuple[str, str] | None) -> None:
    assert clean_pair(source, translation, script) == expected


def test_combining_marks_are_part_of_words() -> None:
    assert is_plain("क्षेत्रों", "Deva")
