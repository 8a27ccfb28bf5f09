"""The gettext data: whole programs held out, none of their texts in training, no false negatives, the same bytes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.training.data.gettext_catalogs.gettext_folders import LOCALES, PROGRAMS, write_catalog, write_catalogs
from training.common.errors import UserError
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.cleaning.normalise import normalise
from training.data.gettext_catalogs.catalogs import LOCALE_DIRS, find_catalogs, read_messages
from training.data.gettext_catalogs.cleaning import clean_pair
from training.data.gettext_catalogs.sources import build_gettext
from training.data.manifest import load_manifest
from training.data.published import PublishedFile
from training.evaluation.pairs import load_pairs

NEGATIVES = [f"negative_{number}" for number in range(1, 5)]
SOURCES = ["gettext_translation", "gettext_pairs"]
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_catalogs(tmp_path_factory.mktemp("catalogs") / "locale")
    # What a machine has beside good catalogs of languages.
    write_catalog(folder, "en_GB", "lands", [("Color of the land", "Colour of the land")])
    write_catalog(folder, "C", "lands", [("Color of the land", "Colour of the land")])
    write_catalog(folder, "de", "broken", [("Color of the land", "Farbe")]).write_bytes(b"\xde\x12")
    return folder


@pytest.fixture(scope="module")
def folder(catalogs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(catalogs, tmp_path_factory.mktemp("gettext") / "build")


def build(catalogs: Path, output: Path, **options) -> Path:
    return build_gettext(output, locale_dirs=[str(catalogs)], **{"num_negatives": len(NEGATIVES), **options})


def rows_of(folder: Path, name: str) -> Rows:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def meanings(catalogs: Path) -> dict[tuple[str, str, str], set[str]]:
    """(language, script, text) -> every English text that it translates, in any program."""
    meanings = defaultdict(set)
    for file in find_catalogs([catalogs]):
        if file.domain in PROGRAMS and file.locale in LOCALES:
            tag = locale_tag(file.locale)
            for source, translation in read_messages(file.path):
                pair = clean_pair(source, translation, script_of(tag))
                if pair:
                    meanings[iso639_3(tag), script_of(tag), normalise(pair[1])].add(normalise(pair[0]))
    return meanings


def test_manifest_and_columns(folder: Path) -> None:
    sources = load_manifest(folder / "manifest.yaml")
    assert [source.name for source in sources] == SOURCES
    for source in sources:
        table = pq.read_table(source.files[0])
        assert table.column_names == ["query", "passage", *NEGATIVES, "lang", "script", "domain"]
        assert PublishedFile(source.files[0], len(NEGATIVES)).num_rows == table.num_rows > 500
        assert set(table["lang"].to_pylist()) <= set(source.languages)
        assert source.task_type == "retrieval" and source.licence


def test_rows_are_translations_and_their_negatives_are_not(folder: Path, meanings: dict) -> None:
    by_text, same_meaning = defaultdict(set), defaultdict(set)
    for (_, _, text), english in meanings.items():
        by_text[text] |= english
        for each in english:
            same_meaning[each] |= english
    for name in SOURCES:
        for row in rows_of(folder, name):
            query, passage, *negatives = (normalise(row[column]) for column in ("query", "passage", *NEGATIVES))
            assert len({passage, *negatives}) == len(NEGATIVES) + 1
            own = meanings[row["lang"], row["script"], query]
            if name == "gettext_translation":
                assert passage in own
                assert "_" not in row["query"] and not row["query"].endswith("…")
                assert not (own | same_meaning[passage]) & set(negatives)
            else:
                assert by_text[query] & by_text[passage]
                assert query not in (passage, *negatives)


def test_negatives_are_of_the_program_and_share_words(folder: Path) -> None:
    rows = [row for row in rows_of(folder, SOURCES[0]) if row["domain"] == "lands"]
    shared = [
        bool({*normalise(row["passage"]).split()} & {*normalise(row[column]).split()})
        for row in rows
        for column in NEGATIVES
    ]
    # "North Korea" beside "North Macedonia".
    assert sum(shared) > 0.2 * len(shared) > 0


def test_whole_programs_are_held_out_and_nothing_leaks(folder: Path) -> None:
    record = json.loads((folder / "build.json").read_text())
    held_out = rows_of(folder, "held_out")
    assert {row["domain"] for row in held_out} == set(record["held_out_domains"])
    texts = {normalise(row[column]) for row in held_out for column in ("query", "passage")}
    texts |= {normalise(row["passage"]) for row in rows_of(folder, "candidates")}
    for name in SOURCES:
        for row in rows_of(folder, name):
            assert row["domain"] not in record["held_out_domains"]
            for column in set(row) - {"lang", "script", "domain"}:
                assert normalise(row[column]) not in texts, (name, column, row)


def test_held_out_pairs_can_be_evaluated(folder: Path) -> None:
    pairs = load_pairs(folder / "held_out.parquet", folder / "candidates.parquet")
    assert len(set(pairs.languages)) == len({locale_tag(locale).split("-")[0] for locale in LOCALES})
    assert {"Cyrl", "Latn", "Hans", "Hant", "Jpan", "Deva"} == set(pairs.scripts)
    queries = list(zip(pairs.languages, pairs.scripts, map(normalise, pairs.queries), strict=True))
    assert len(queries) == len(set(queries)), "a query has one right answer"


def test_no_translation_occurs_twice(folder: Path) -> None:
    columns = ("lang", "script", "query", "passage")
    rows = [tuple(normalise(row[column]) for column in columns) for row in rows_of(folder, SOURCES[0])]
    assert len(rows) == len(set(rows))


def test_record_counts_what_was_skipped(folder: Path, catalogs: Path) -> None:
    record = json.loads((folder / "build.json").read_text())
    assert record["skipped_locales"] == {"no known language": {"C": 1}, "English": {"en_GB": 1}}
    assert record["damaged"] == [str(catalogs / "de/LC_MESSAGES/broken.mo")]
    assert record["catalogs"] == len(LOCALES) * len(PROGRAMS)
    assert record["messages"] == record["unusable"] + record["repeated"] + record["translations"]


def test_at_most_so_many_rows_evenly_over_programs(catalogs: Path, tmp_path: Path) -> None:
    folder = build(catalogs, tmp_path / "build", rows_per_language=60, pairs_per_language=20, held_out_per_language=10)
    for name, most in ((SOURCES[0], 60), (SOURCES[1], 20), ("held_out", 10)):
        count = defaultdict(int)
        for row in rows_of(folder, name):
            count[row["lang"], row["script"]] += 1
        assert set(count) and max(count.values()) <= most
    domains = [row["domain"] for row in rows_of(folder, SOURCES[0])]
    assert max(map(domains.count, set(domains))) < 1.5 * min(map(domains.count, set(domains)))


def test_same_options_same_bytes_and_another_seed_others(catalogs: Path, folder: Path, tmp_path: Path) -> None:
    again, other = build(catalogs, tmp_path / "again"), build(catalogs, tmp_path / "other", seed=1)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in again.iterdir()}
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    assert (folder / "gettext_translation.parquet").read_bytes() != (other / "gettext_translation.parquet").read_bytes()
    assert build(catalogs, again) == again


@pytest.mark.parametrize(
    "options", [{"held_out_share": 0.0}, {"held_out_share": 1.0}, {"num_negatives": 0}, {"rows_per_language": 0}]
)
def test_options_out_of_range(catalogs: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        build(catalogs, tmp_path / "build", **options)
    assert not list(tmp_path.iterdir())


def test_more_negatives_than_messages(tmp_path: Path) -> None:
    for domain, verb, wort in (("one", "Open", "öffnen"), ("two", "Close", "schließen")):
        messages = [(f"{verb} {name}", f"{name} {wort}") for name in ("Albania", "Brazil", "Chad", "Denmark")]
        write_catalog(tmp_path / "locale", "de", domain, messages)
    build(tmp_path / "locale", tmp_path / "three", num_negatives=3)
    with pytest.raises(UserError, match="lower 'num_negatives'"):
        build(tmp_path / "locale", tmp_path / "build", num_negatives=4)
    assert not (tmp_path / "build").exists()


def test_too_few_catalogs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for catalogs in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match=r"0 programs, too few .*language packs.*'locale_dirs'"):
            build(catalogs, tmp_path / "build")
    write_catalog(tmp_path / "one", "de", "lands", [("Color of the land", "Farbe des Landes")])
    with pytest.raises(UserError, match="1 programs, too few"):
        build(tmp_path / "one", tmp_path / "build")
    write_catalog(tmp_path / "one", "de", "same", [("Color of the land", "Farbe des Landes")])
    with pytest.raises(UserError, match="1 messages to train on and 0 to hold out"):
        build(tmp_path / "one", tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_catalogs_of_this_machine(tmp_path: Path) -> None:
    links = tmp_path / "locale"
    for file in find_catalogs(LOCALE_DIRS):
        if file.locale in ("eo", "ja") and file.path.stat().st_size < 60_000:
            link = links / file.locale / "LC_MESSAGES" / file.path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to(file.path)
    if len({file.domain for file in find_catalogs([links])}) < 10:
        pytest.skip("few catalogs are installed on this machine")
    folder = build(links, tmp_path / "build", rows_per_language=500, pairs_per_language=100)
    assert json.loads((folder / "build.json").read_text())["damaged"] == []
    assert load_pairs(folder / "held_out.parquet", folder / "candidates.parquet").queries
