"""Write data of four kinds, as people have them, from the manual pages and message catalogs of this machine.

python training/examples/own_data.py [--output runs/own_data] [--language de]
python training/run_stage.py --data runs/own_data/manual.jsonl --model MODEL --output_dir runs/mine

manual.jsonl has questions and answers, messages.csv translations, labels.tsv texts and the program of each, and
graded.parquet pairs of English messages, graded by how many languages translate both with the same words.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import logging
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypeVar

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow as pa
import pyarrow.parquet as pq

from training.common.command import command_parser, run_command
from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.common.languages import locale_tag, script_of
from training.common.outputs import check_output, whole_file
from training.data.cleaning.normalise import normalise
from training.data.gettext_catalogs.messages import LOCALE_DIRS, clean_pair, find_catalogs, program_of, read_messages

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAN_DIR = "/usr/share/man"
FILES = ("manual.jsonl", "messages.csv", "labels.tsv", "graded.parquet")
# Rows per file, and labels.
MOST_ROWS, MOST_LABELS = 20_000, 30
# Pages of one program, as "git" of git-add and git-am: some describe each of their thousands of commands.
_PAGES_PER_PROGRAM = 500
_SECTIONS_PER_PAGE = 20
_TEXTS_PER_LABEL = (100, 400)
_FEWEST_WORDS, _MOST_WORDS = 20, 100
# Texts of several pages that begin with the same words are usually the same text with other names in it.
_BEGINNING = 10
_LETTER_SHARE = 0.7
# Languages that both texts of a graded pair are translated into.
_FEWEST_LANGUAGES = 5
# Common languages with many catalogs, of several families.
_GRADING = ("cs", "de", "es", "fr", "it", "ja", "nl", "pl", "pt_BR", "ru", "sv", "tr", "uk", "zh_CN")
_SAME_ON_EVERY_PAGE = re.compile(
    r"NAME|SYNOPSIS|SEE ALSO|AUTHORS?|COPYRIGHT.*|LICEN[CS]E.*|(REPORTING )?BUGS|HISTORY|COLOPHON|VERSIONS?|ATTRIBUTES"
    r"|LIBRARY|STANDARDS|CONFORMING TO|AVAILABILITY|RESOURCES|THANKS|CREDITS|ACKNOWLEDGE?MENTS?|GIT|POD ERRORS",
    re.IGNORECASE,
)

# Requests of groff(7) and man(7) after which text is no prose (code, tables, definitions), and what ends it.
_NO_PROSE = {"nf": "fi", "EX": "EE", "Vb": "Ve", "TS": "TE", "EQ": "EN", "PS": "PE", "de": ".", "de1": ".", "ig": "."}
_FONTS = {"B": " ", "I": " ", "SM": " ", "SB": " ", **dict.fromkeys(("BR", "RB", "BI", "IB", "IR", "RI"), "")}
_REQUEST = re.compile(r"[.'][ \t]*(\S*)[ \t]*(.*)")
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)')
_COMMENT = re.compile(r'\\["#].*')
_NAME = r"(?:\(..|\[[^\]]*\]|.)"
_ESCAPE = re.compile(
    rf"\\(?:[fFgkmMnY]{_NAME}|s[-+]?\d+|[hvwlLDbxXASRBHoZ]'[^']*'"
    rf"|\*(?P<string>{_NAME})|(?P<glyph>\(..|\[[^\]]*\])|(?P<other>.))"
)
# Strings, most of them those of pod2man, glyphs of groff_char(7), and escapes of one character; all others are removed.
_STRINGS = {"Aq": "'", "L'": "'", 'L"': '"', 'R"': '"', "lq": '"', "rq": '"', "--": "–", "C+": "C++", "PI": "pi"}
_GLYPHS = {"aq": "'", "oq": "‘", "cq": "’", "lq": "“", "rq": "”", "dq": '"', "em": "—", "en": "–", "hy": "-", "mi": "−"}
_GLYPHS |= {"ha": "^", "ti": "~", "rs": "\\", "ga": "`", "mu": "×", "->": "→", "<=": "≤", ">=": "≥", "ss": "ß"}
_CHARACTERS = {"-": "-", "e": "\\", "\\": "\\", "~": " ", " ": " ", "0": " ", "t": " ", "'": "'", "`": "`", ".": "."}


class Section(NamedTuple):
    """A section of a manual page."""

    part: str  # the heading (.SH) that it is below
    heading: str  # its own one (.SS), or the same
    text: str


def read_sections(source: str) -> Iterator[Section]:
    """Yield the sections of a page written in the macros of man(7), as plain text; other pages have none."""
    part = heading = end = None
    lines: list[str] = []
    untitled = False
    for line in [*source.replace("\\\n", "").splitlines(), ".SH end"]:
        line = _COMMENT.sub("", line)
        name, rest = found.groups() if (found := _REQUEST.match(line)) else (None, line)
        if end is not None:
            if name != end and (name != "SH" or end == "."):
                continue
            end = None
        arguments = [(quoted or bare).replace('""', '"') for quoted, bare in _ARGUMENT.findall(rest)]
        if name in ("SH", "SS"):
            if heading is not None:
                yield Section(part, heading, plain_text(" ".join(lines)))
            lines, untitled = [], not arguments
            heading = plain_text(" ".join(arguments))
            part = heading if name == "SH" or part is None else part
        elif name is None or name in _FONTS:
            text = rest if name is None else _FONTS[name].join(arguments)
            if untitled:
                # A heading may be on the line after its request.
                heading, untitled = plain_text(text), False
            else:
                lines.append(text)
        elif name == "IP":
            lines += arguments[:1]
        else:
            end = _NO_PROSE.get(name)


def plain_text(text: str) -> str:
    """Return roff text without escapes and with single spaces."""
    return " ".join(_ESCAPE.sub(_character, text).split())


def _character(escape: re.Match[str]) -> str:
    string, glyph, other = escape["string"], escape["glyph"], escape["other"]
    if glyph:
        code = glyph.strip("[]()")
        return chr(int(code[1:], 16)) if re.fullmatch("u[0-9A-F]{4,5}", code) else _GLYPHS.get(code, "")
    return _STRINGS.get(string.strip("[]("), "") if string else _CHARACTERS.get(other or "", "")


def read_manual(folders: Sequence[Path | str]) -> list[tuple[str, str]]:
    """Return questions and answers from the English manual pages in ``FOLDER/man1`` to ``FOLDER/man8``.

    A question is what a page says about its subject, with the heading of a section but for "DESCRIPTION"; the answer is
    the beginning of that section. Texts that begin alike, and questions with several answers, are left out.
    """
    programs = defaultdict(list)
    for path in (path for folder in folders for path in Path(folder).glob("man[1-8]/*") if path.is_file()):
        # Other names of a page are links.
        if not path.is_symlink():
            programs[re.split(r"[-_.:]", path.name, maxsplit=1)[0]].append(path)
    if not programs:
        what = f"{', '.join(map(str, folders))}: no manual pages"
        raise UserError(f"{what}; install some (Debian: man-db and manpages), or name a folder with --man_dirs")
    found = []
    for own in programs.values():
        for path in draw(own, _PAGES_PER_PROGRAM, key=_page_name):
            found += draw(_questions(path), _SECTIONS_PER_PAGE)
    beginnings = Counter(beginning for _, beginning, _ in found)
    questions = Counter(normalise(question) for question, _, _ in found)
    return [
        (question, answer)
        for question, beginning, answer in found
        if beginnings[beginning] == 1 and questions[normalise(question)] == 1
    ]


def _page_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _questions(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield question, beginning of the section, and the answer: page, heading and the first words of the section."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        logger.warning("%s: not a readable manual page (%s); skipped", path, error)
        return
    sections = list(read_sections(content.decode("utf-8", "replace")))
    summary = next((each.text for each in sections if each.heading.upper() == "NAME"), "")
    names, _, subject = re.sub(r"\s[-–—−]+\s", "\0", summary, count=1).partition("\0")
    for part, heading, text in sections:
        words = text.split()
        letters = sum(map(str.isalpha, text)) / max(1, len(text) - len(words) + 1)
        if len(words) < _FEWEST_WORDS or letters < _LETTER_SHARE or "\ufffd" in text or not subject:
            continue
        if not _SAME_ON_EVERY_PAGE.fullmatch(part) and not _SAME_ON_EVERY_PAGE.fullmatch(heading):
            title = heading.lower() if heading.isupper() else heading
            question = subject if title.lower() == "description" else f"{subject}: {title}"
            body, beginning = (" ".join(words[:most]) for most in (_MOST_WORDS, _BEGINNING))
            yield question, beginning, f"{names.split(',')[0]}({path.parent.name[3:]}), {title}: {body}"


def read_translations(folders: Sequence[Path | str], locale: str) -> list[tuple[str, str, str]]:
    """Return the distinct messages of a locale as (text, English text, program).

    Messages with placeholders or markup are cleaned of them; others keep the line breaks that they have.
    """
    try:
        script = script_of(locale_tag(locale))
    except ValueError as error:
        raise UserError(f"--language: {error}") from None
    found: dict[tuple[str, str], tuple[str, str, str]] = {}
    for catalog in find_catalogs(folders):
        if catalog.locale == locale:
            for message in read_messages(catalog.path):
                if pair := clean_pair(*message, script):
                    english, text = map(_as_written, message, pair)
                    form = normalise(english), normalise(text)
                    found.setdefault(form, (text, english, program_of(catalog.domain)))
    if not found:
        fault = f"{', '.join(map(str, folders))}: no messages in {locale!r}"
        raise UserError(f"{fault}; install translated programs, or give another --language or other --locale_dirs")
    return list(found.values())


def _as_written(message: str, cleaned: str) -> str:
    return message.strip() if message.split() == cleaned.split() else cleaned


def label_programs(messages: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Return English texts of one program each, and the program, for the programs with the most texts."""
    owners = defaultdict(set)
    for _, english, program in messages:
        owners[" ".join(english.split())].add(program)
    texts = defaultdict(list)
    for text, programs in owners.items():
        if len(programs) == 1:
            texts[programs.pop()].append(text)
    fewest, most = _TEXTS_PER_LABEL
    largest = sorted(texts, key=lambda program: (-len(texts[program]), program))[:MOST_LABELS]
    return [(text, each) for each in largest if len(texts[each]) >= fewest for text in draw(texts[each], most, key=str)]


def grade(translations: Mapping[str, Sequence[tuple[str, str, str]]]) -> list[tuple[str, str, float]]:
    """Return pairs of English texts with a score in [0, 1], from the translations of each locale.

    The score is the share of locales that translate both with the same words, of those that translate both, as pivot
    languages find paraphrases (Bannard and Callison-Burch, "Paraphrasing with bilingual parallel corpora", 2005). For
    each pair with a translation in common, there is another of its first text and a drawn one that shares a word.
    """
    spelling: dict[str, str] = {}
    forms: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    shared: set[tuple[str, str]] = set()
    for locale, messages in translations.items():
        meanings = defaultdict(set)
        for text, english, _ in messages:
            form = normalise(english)
            spelling.setdefault(form, " ".join(english.split()))
            forms[form][locale].add(normalise(text))
            meanings[normalise(text)].add(form)
        for each in meanings.values():
            shared.update(combinations(sorted(each), 2))
    with_word = defaultdict(list)
    for form in sorted(forms):
        for word in set(form.split()):
            with_word[word].append(form)
    for one, other in sorted(shared):
        words = sorted(set(one.split()))
        shared.add(tuple(sorted((one, _pick(with_word[_pick(words, one, other)], other, one)))))
    rows = []
    for one, other in sorted(shared):
        both = forms[one].keys() & forms[other].keys()
        if len(both) >= _FEWEST_LANGUAGES and one != other:
            same = sum(not forms[one][locale].isdisjoint(forms[other][locale]) for locale in both)
            rows.append((spelling[one], spelling[other], round(same / len(both), 4)))
    return rows


def _pick(items: Sequence[T], *key: str) -> T:
    return items[int(keyed_bits(*map(text_key, key)) % len(items))]


def draw(rows: Iterable[T], most: int, key: Callable[[T], str] = repr) -> list[T]:
    """Return at most ``most`` rows, drawn by a key that is a function of each row alone, in the order drawn."""
    return sorted(rows, key=lambda row: (int(keyed_bits(text_key(key(row)))), key(row)))[:most]


def write_files(
    output: Path, man_dirs: Sequence[str], locale_dirs: Sequence[str], language: str, most: int
) -> Iterator[str]:
    """Write the files and yield a line about each."""
    manual = draw(read_manual(man_dirs), most)
    there = {catalog.locale for catalog in find_catalogs(locale_dirs)}
    locales = [language, *(locale for locale in _GRADING if locale in there and locale != language)]
    translations = {locale: read_translations(locale_dirs, locale) for locale in locales}
    messages = draw(((text, english) for text, english, _ in translations[language]), most)
    labels, graded = draw(label_programs(translations[language]), most), draw(grade(translations), most)
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / FILES[0]) as path, path.open("w", encoding="utf-8") as file:
        for question, answer in manual:
            file.write(json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n")
    yield f"{output / FILES[0]}: {len(manual):,} questions about manual pages, each with its answer"
    # As spreadsheets save it: a byte order mark, CRLF, and quotes around line breaks.
    _write_table(output / FILES[1], ("source", "target"), messages, "excel", "utf-8-sig")
    yield f"{output / FILES[1]}: {len(messages):,} messages in {language!r}, each with its English original"
    _write_table(output / FILES[2], ("text", "label"), labels, "excel-tab", "utf-8")
    programs = len({label for _, label in labels})
    yield f"{output / FILES[2]}: {len(labels):,} English messages, each with its program, one of {programs}"
    columns = zip(*graded, strict=True) if graded else ([], [], [])
    with whole_file(output / FILES[3]) as path:
        pq.write_table(pa.table(dict(zip(("sentence1", "sentence2", "score"), map(list, columns), strict=True))), path)
    yield f"{output / FILES[3]}: {len(graded):,} pairs of English messages, each with a score"


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], dialect: str, encoding: str) -> None:
    with whole_file(path) as partial, partial.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, dialect).writerows([header, *rows])


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = command_parser("own_data.py", __doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/own_data"), help="folder to write (%(default)s)")
    parser.add_argument("--man_dirs", nargs="+", default=[MAN_DIR], help=f"folders of manual pages ({MAN_DIR})")
    parser.add_argument("--locale_dirs", nargs="+", default=LOCALE_DIRS, help="folders of message catalogs")
    parser.add_argument("--language", default="de", help="locale of the translated messages (%(default)s)")
    parser.add_argument("--most", type=int, default=MOST_ROWS, help="most rows of a file (%(default)s)")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(partial(_run, make_parser().parse_args(words)))


def _run(arguments: argparse.Namespace) -> None:
    check_output(arguments.output, map(Path, (*arguments.man_dirs, *arguments.locale_dirs)), ours=FILES)
    if arguments.most < 1:
        raise UserError(f"--most {arguments.most}: give a number from 1")
    for line in write_files(
        arguments.output, arguments.man_dirs, arguments.locale_dirs, arguments.language, arguments.most
    ):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    raise SystemExit(main())
