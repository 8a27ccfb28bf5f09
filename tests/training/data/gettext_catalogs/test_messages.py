"""Catalogs are found and read as programs read them, and their messages become plain text."""

from __future__ import annotations

import struct

import pytest

from tests.training.data.gettext_catalogs.gettext_folders import write_catalog
from training.common.errors import UserError
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.gettext_catalogs.messages import clean, clean_pair, find_catalogs, program_of, read_messages


def write_mo(path, messages, charset="utf-8", order="<", plural=""):
    """A catalog written byte by byte, with any header."""
    header = f"Content-Type: text/plain; charset={charset}\n{plural}"
    encoded = [[text.encode(charset) for text in column] for column in zip(("", header), *messages, strict=True)]
    offset, tables, content = 28 + 16 * len(encoded[0]), b"", b""
    for text in (*encoded[0], *encoded[1]):
        tables += struct.pack(f"{order}2I", len(text), offset + len(content))
        content += text + b"\0"
    start = struct.pack(f"{order}7I", 0x950412DE, 0, len(encoded[0]), 28, 28 + 8 * len(encoded[0]), 0, offset)
    path.write_bytes(start + tables + content)
    return path


def test_catalogs_of_several_folders_in_order_and_versions_of_a_program(tmp_path):
    for folder, locale, domain in (("a", "fr", "two"), ("b", "de", "one"), ("a", "de", "two")):
        write_catalog(tmp_path / folder, locale, domain, [("Open", "x")])
    (tmp_path / "a/locale.alias").write_text("not a catalog")
    found = find_catalogs([tmp_path / "a", tmp_path / "b", tmp_path / "absent"])
    assert [(file.locale, file.domain) for file in found] == [("de", "one"), ("de", "two"), ("fr", "two")]
    programs = {"gtk30": "gtk", "gtk20-properties": "gtk20-properties", "evolution-3.44": "evolution", "7": "7"}
    assert {domain: program_of(domain) for domain in programs} == programs


@pytest.mark.parametrize(("charset", "order"), [("utf-8", "<"), ("utf-8", ">"), ("iso-8859-2", "<")])
def test_charsets_byte_orders_and_contexts(tmp_path, charset, order):
    messages = [("Open", "Otevřít"), ("Šave", ""), ("menu\x04Close", "Zavřít")]
    read = list(read_messages(write_mo(tmp_path / "x.mo", messages, charset, order)))
    assert read == [("Open", "Otevřít"), ("Šave", ""), ("Close", "Zavřít")]


@pytest.mark.parametrize(
    ("rule", "forms", "expected"),
    [
        ("nplurals=1; plural=0;", "一つ", ["一つ", "一つ"]),
        # Of the three Polish forms, the one for 5 and most others; of the Arabic ones, that for 11 to 99.
        ("plural=(n==1 ? 0 : n%10>=2 && n%10<=4 && (n%100<10 || n%100>=20) ? 1 : 2);", "a\0b\0c", ["a", "c"]),
        ("plural=n==0 ? 0 : n==1 ? 1 : n==2 ? 2 : n%100>=3 && n%100<=10 ? 3 : n%100>=11 ? 4 : 5;", "abcdef", "be"),
        # The rule of German where there is none or a faulty one.
        ("", "eins\0viele", ["eins", "viele"]),
        ("nplurals=2; plural=n +* 1;", "eins\0viele", ["eins", "viele"]),
        ("nplurals=2; plural=(n != 1);", "nur eins", ["nur eins", "nur eins"]),
    ],
)
def test_plurals(tmp_path, rule, forms, expected):
    forms = "\0".join(forms) if forms.isascii() and len(forms) == 6 else forms
    path = write_mo(tmp_path / "x.mo", [("menu\x04one\0many", forms)], plural=f"Plural-Forms: {rule}\n" if rule else "")
    assert list(read_messages(path)) == list(zip(["one", "many"], expected, strict=True))


@pytest.mark.parametrize("length", [0, 10, 40, -8])
def test_damaged_catalog_is_named(tmp_path, length):
    path = write_catalog(tmp_path, "de", "broken", [("Open the file", "Datei öffnen")])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"broken\.mo: not a readable message catalog .*install its package again"):
        list(read_messages(path))


@pytest.mark.parametrize(
    ("locale", "tag", "code", "script"),
    [
        ("sr@ijekavianlatin", "sr-Latn", "srp", "Latn"),
        ("sr_RS@ijekavian", "sr-RS", "srp", "Cyrl"),
        ("ca@valencia", "ca", "cat", "Latn"),
        ("zh_HK", "zh-HK", "zho", "Hant"),
        ("pa_PK", "pa-PK", "pan", "Arab"),
        ("de_DE.UTF-8@euro", "de-DE", "deu", "Latn"),
    ],
)
def test_locales(locale, tag, code, script):
    assert locale_tag(locale) == tag
    assert (iso639_3(tag), script_of(tag)) == (code, script)
    for name in ("C", "POSIX", "l10n", "de_de", ""):
        with pytest.raises(ValueError, match="does not name a locale"):
            locale_tag(name)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Copied %d of %-10.*s files", "Copied of files"),  # C
        ("Wrote %<PRIu64> bytes", "Wrote bytes"),
        ("Found %(count)d items", "Found items"),  # Python
        ("Hello {name}, {0:.2f} and {}", "Hello, and"),
        ("Page %1 of %L2", "Page of"),  # Qt and KDE
        ("Drive %{volume} is full", "Drive is full"),
        ("Saved in $HOME and ${folder}", "Saved in and"),  # shell
        ("100%% done", "100% done"),
        ("At %I:%M %p today", "At: today"),
        ("Could not open “%s” (%s)", "Could not open"),  # what held a placeholder goes with it
        ("`%s' not found", "not found"),
        ("<b>Warning</b>: no <a href='x'>disk</a>", "Warning: no disk"),  # markup
        ("Fish &amp; chips &#8211; now", "Fish & chips – now"),
        ("_File", "File"),  # accelerators
        ("&copy here", "copy here"),
        ("ファイル(_F)", "ファイル"),
        ("Save && quit", "Save & quit"),
        ("black & white", "black & white"),
        ("unset MY_OWN_VARIABLE first", "unset MY_OWN_VARIABLE first"),
        ("Save As…", "Save As"),  # ends
        ("Searching . . .\tplease wait...", "Searching... please wait"),
        ("名前：", "名前"),
        ("  two\n lines\\n here ", "two lines here"),  # white space
        ("a\u200eb\u00adc\ufeff", "abc"),
        ("کتاب\u200cخانه", "کتاب\u200cخانه"),  # but not the joiners of Persian
        ("Cafe\u0301", "Café"),
        ("_: verb\nOpen", "Open"),  # contexts
        ("Öffnen|/|$[gen]", "Öffnen"),
    ],
)
def test_clean(message, expected):
    assert clean(message) == expected


@pytest.mark.parametrize(
    ("source", "translation", "script", "expected"),
    [
        ("_Open the file…", "Datei _öffnen …", "Latn", ("Open the file", "Datei öffnen")),
        ("Column|Width", "Column|Breite", "Latn", ("Width", "Breite")),
        ("File", "文件", "Hans", ("File", "文件")),
        ("Open the file", "", "Latn", None),  # untranslated
        ("Open the file", "_Open the FILE.", "Latn", None),
        ("Open the file", "Open a file", "Cyrl", None),
        ("Your names", "Ada Lovelace", "Latn", None),
        ("Go", "Gehe zu", "Latn", None),  # short
        ("File", "ไฟ", "Thai", None),
        ("%s: %d", "%s: %d", "Latn", None),
        ("Size 10.5 x 12.7, 300 / 400", "Maß 10,5 x 12,7, 300 / 400", "Latn", None),  # mostly no letters
        ("Visit our site at https://example.org", "Mehr auf https://example.org", "Latn", None),
        ("-f, --file   read the file", "-f, --file   Datei lesen", "Latn", None),
        ("translator-credits", "Ada Lovelace, Emil Post", "Latn", None),
        ("HTTP/1.1 GNOME", "HTTP/1.1 (GNOME)", "Latn", None),  # no word of a language
        ("word " * 100, "Wort " * 100, "Latn", None),
        ("Of the fields", "क्षेत्रों", "Deva", ("Of the fields", "क्षेत्रों")),  # marks are part of words
    ],
)
def test_clean_pair(source, translation, script, expected):
    assert clean_pair(source, translation, script) == expected
