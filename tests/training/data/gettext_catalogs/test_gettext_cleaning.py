"""Messages become plain text: one test for each thing a program's message carries beside its words."""

from __future__ import annotations

import pytest

from training.data.cleaning.normalise import normalise
from training.data.gettext_catalogs.cleaning import clean, clean_pair, is_plain


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


def test_marks_are_no_reason_to_drop_a_text() -> None:
    assert is_plain("क्षेत्रों", "Deva")


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("Open file", "open  FILE!", True),
        ("Can't", "Cant", False),
        ("हिंदी", "हिदी", False),
        ("…", "...", True),
    ],
)
def test_same_text(text: str, other: str, same: bool) -> None:
    assert (normalise(text) == normalise(other)) is same
