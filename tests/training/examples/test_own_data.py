from __future__ import annotations

import csv
import gzip
import json
import re

import pandas as pd
import pytest

from tests.training.data.gettext_catalogs.gettext_folders import write_catalog, write_catalogs
from training.examples.own_data import FILES, grade, main, plain_text, read_manual, read_sections, read_translations

WORDS = "{} is what this section describes in some twenty plain words, as a person has to know it before using it."
PAGE = r"""
.\" A comment.
.de Sp
.SH "IN A DEFINITION"
..
.TH {name} 1
.SH NAME
{name}, other \- {subject}
.SH SYNOPSIS
.B {name}
.SH DESCRIPTION
{words}
.SH SEE ALSO
{words}
"""


def _page(folder, file, name, subject, words=None):
    text = PAGE.format(name=name, subject=subject, words=words or WORDS.format(name)).encode()
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_roff_is_read_as_plain_text():
    source = r'''
.SH "FIRST ""PART"""
One \fBtwo\fR\|\-\-three\&.\" comment
.BR four (1),
.B "five  six" \
seven
.nf
code
.fi
.IP \(bu 2
eight
.SS
Second \*(L"part\*(R"
.TS
table
.TE
\(lqnine\(rq \s-2ten\s+2 \h'1n'\[u00E9] \(Aq
.SH LAST
'''
    assert list(read_sections(source)) == [
        ('FIRST "PART"', 'FIRST "PART"', "One two--three. four(1), five six seven eight"),
        ('FIRST "PART"', 'Second "part"', "“nine” ten é"),
        ("LAST", "LAST", ""),
    ]
    assert plain_text(r"a\ b\ec \f[B]d\fP\/ \*(C`e\*(C' \(em") == r"a b\c d e —"
    # The macros of mdoc(7).
    assert not list(read_sections(".Sh NAME\n.Nm ssh\n"))


def test_a_page_becomes_questions_with_answers(tmp_path, caplog):
    link = _page(tmp_path, "man1/list.1.gz", "list", "list files").parent / "alias.1.gz"
    link.symlink_to("list.1.gz")
    part = f"Bad blocks: {WORDS}"
    _page(tmp_path, "man8/disk.8", "disk", "describe disks", f"{WORDS.format('disk')}\n.SS BAD BLOCKS\n{part}")
    (tmp_path / "man3").mkdir()
    (tmp_path / "man3/broken.3.gz").write_bytes(b"\x1f\x8b broken")
    # Texts that begin alike, and a question with two answers.
    for name in ("one", "two"):
        _page(tmp_path, f"man1/{name}.1", name, f"do {name}", f"All of this is on every page that there is. {WORDS}")
        _page(tmp_path, f"man2/{name}.2", name, "do either of them", f"{name} {WORDS}")
    # Neither pages of other languages nor short texts.
    _page(tmp_path, "de/man1/liste.1", "liste", "Dateien auflisten")
    _page(tmp_path, "man1/short.1", "short", "say little", "It says little.")
    assert sorted(read_manual([tmp_path])) == [
        ("describe disks", f"disk(8), description: {WORDS.format('disk')}"),
        ("describe disks: bad blocks", f"disk(8), bad blocks: {part}"),
        ("list files", f"list(1), description: {WORDS.format('list')}"),
    ]
    assert re.search(r"broken\.3\.gz: not a readable manual page", caplog.text)


def test_messages_keep_their_line_breaks_but_no_placeholders(tmp_path, refuses):
    messages = [("Open the\nfile now", "Die Datei\njetzt öffnen"), ("Close %s at once", "%s sofort schließen")]
    write_catalog(tmp_path, "de", "editor2", messages)
    write_catalog(tmp_path, "de", "viewer", [("open the file now", "Die Datei jetzt öffnen")])
    assert sorted(read_translations([tmp_path], "de")) == [
        ("Die Datei\njetzt öffnen", "Open the\nfile now", "editor"),
        ("sofort schließen", "Close at once", "editor"),
    ]
    with refuses("no messages in 'fr'", "--language"):
        read_translations([tmp_path], "fr")
    with refuses("--language", "'Deutsch'"):
        read_translations([tmp_path], "Deutsch")


def test_a_grade_is_the_share_of_languages_with_the_same_words():
    locales = ("cs", "de", "es", "fr", "it", "ja")
    english = ("Delete it", "Remove it")
    same = {locale: [(f"{locale} löschen", text, "") for text in english] for locale in locales}
    for locale in locales[:2]:
        same[locale][1] = (f"{locale} entfernen", "Remove it", "")
    # In too few languages.
    same["cs"].append(("cs löschen", "Erase it", ""))
    assert grade(same) == [("Delete it", "Remove it", 0.6667)]


@pytest.fixture
def folders(tmp_path):
    for number in range(5):
        _page(tmp_path / "man", f"man1/p{number}.1", f"p{number}", f"do {number}", f"{number} {WORDS}")
    write_catalogs(tmp_path / "locale", ["cs", "de", "es", "fr", "it"])
    return ["--man_dirs", str(tmp_path / "man"), "--locale_dirs", str(tmp_path / "locale")]


def test_the_command_writes_the_same_files_again(tmp_path, folders, capsys):
    assert main(["--output", str(tmp_path / "own"), *folders]) == 0
    written = {name: (tmp_path / "own" / name).read_bytes() for name in FILES}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / "own" / name) for name in FILES]
    assert main(["--output", str(tmp_path / "own"), *folders]) == 0
    assert written == {name: (tmp_path / "own" / name).read_bytes() for name in FILES}

    rows = [json.loads(line) for line in written["manual.jsonl"].splitlines()]
    assert len(rows) == 5 and rows[0].keys() == {"question", "answer"}
    assert written["messages.csv"].startswith(b"\xef\xbb\xbfsource,target\r\n")
    with (tmp_path / "own/messages.csv").open(encoding="utf-8-sig", newline="") as file:
        assert ["Deutsch", "German"] in list(csv.reader(file))
    labels = pd.read_csv(tmp_path / "own/labels.tsv", sep="\t", keep_default_na=False)
    assert list(labels) == ["text", "label"] and {"lands", "tongues"} <= {*labels["label"]}
    assert labels["label"].value_counts().between(100, 400).all() and labels["text"].is_unique
    graded = pd.read_parquet(tmp_path / "own/graded.parquet")
    assert list(graded) == ["sentence1", "sentence2", "score"] and graded["score"].between(0, 1).all()
    assert len(graded) and (graded["score"] > 0).any()

    # A smaller draw is part of a larger one.
    assert main(["--output", str(tmp_path / "few"), *folders, "--most", "3"]) == 0
    assert written["manual.jsonl"].startswith((tmp_path / "few/manual.jsonl").read_bytes())


def test_what_a_machine_lacks_is_said_in_one_line(tmp_path, folders, capsys):
    nothing = str(tmp_path / "nothing")
    for words, part in (
        ([*folders, "--man_dirs", nothing], "no manual pages; install some"),
        ([*folders, "--locale_dirs", nothing], "no messages in 'de'; install translated programs"),
        ([*folders, "--most", "0"], "--most 0: give a number from 1"),
    ):
        assert main(["--output", str(tmp_path / "own"), *words]) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1
    assert not (tmp_path / "own").exists()
    assert main(["--output", str(tmp_path / "locale"), *folders]) == 2
    assert "give another --output" in capsys.readouterr().err
