"""The gettext data: whole programs held out, none of their texts in training, no false negatives, the same bytes."""

from __future__ import annotations

import json
from collections import defaultdict

import pyarrow.parquet as pq
import pytest

from tests.training.data.gettext_catalogs.gettext_folders import LOCALES, PROGRAMS, write_catalog, write_catalogs
from training.common.errors import UserError
from training.common.languages import iso639_3, locale_tag, script_of
from training.data.cleaning.normalise import normalise
from training.data.gettext_catalogs.messages import clean_pair, find_catalogs, read_messages
from training.data.gettext_catalogs.sources import build_gettext
from training.data.manifest import load_manifest
from training.data.published import PublishedFile
from training.evaluation.pairs import load_pairs

NEGATIVES = [f"negative_{number}" for number in range(1, 5)]
SOURCES = ["gettext_translation", "gettext_pairs"]


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory):
    folder = write_catalogs(tmp_path_factory.mktemp("catalogs") / "locale")
    # What a machine has beside good catalogs of languages.
    write_catalog(folder, "en_GB", "lands", [("Color of the land", "Colour of the land")])
    write_catalog(folder, "C", "lands", [("Color of the land", "Colour of the land")])
    write_catalog(folder, "de", "broken", [("Color of the land", "Farbe")]).write_bytes(b"\xde\x12")
    return folder


@pytest.fixture(scope="module")
def folder(catalogs, tmp_path_factory):
    return build(catalogs, tmp_path_factory.mktemp("gettext") / "build")


def build(catalogs, output, **options):
    return build_gettext(output, locale_dirs=[str(catalogs)], **{"num_negatives": len(NEGATIVES), **options})


def rows_of(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def meanings(catalogs):
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


def test_manifest_columns_and_counts(folder, catalogs):
    sources = load_manifest(folder / "manifest.yaml")
    assert [source.name for source in sources] == SOURCES
    for source in sources:
        table = pq.read_table(source.files[0])
        assert table.column_names == ["query", "passage", *NEGATIVES, "lang", "script", "domain"]
        assert PublishedFile(source.files[0], len(NEGATIVES)).num_rows == table.num_rows > 500
        assert set(table["lang"].to_pylist()) <= set(source.languages)
        assert source.task_type == "retrieval" and source.licence
    record = json.loads((folder / "build.json").read_text())
    assert record["skipped_locales"] == {"C": 1, "en_GB": 1}
    assert record["damaged"] == [str(catalogs / "de/LC_MESSAGES/broken.mo")]
    assert record["catalogs"] == len(LOCALES) * len(PROGRAMS)
    assert record["messages"] > record["translations"] > 1000


def test_rows_are_translations_and_their_negatives_are_not(folder, meanings):
    by_text, same_meaning = defaultdict(set), defaultdict(set)
    for (_, _, text), english in meanings.items():
        by_text[text] |= english
        for each in english:
            same_meaning[each] |= english
    seen, shared = set(), []
    for name in SOURCES:
        for row in rows_of(folder, name):
            query, passage, *negatives = (normalise(row[column]) for column in ("query", "passage", *NEGATIVES))
            assert len({passage, *negatives}) == len(NEGATIVES) + 1
            own = meanings[row["lang"], row["script"], query]
            if name == "gettext_translation":
                assert passage in own
                # No translation occurs twice.
                assert (row["lang"], row["script"], query, passage) not in seen
                seen.add((row["lang"], row["script"], query, passage))
                assert "_" not in row["query"] and not row["query"].endswith("…")
                assert not (own | same_meaning[passage]) & set(negatives)
                if row["domain"] == "lands":
                    shared += [bool({*passage.split()} & {*negative.split()}) for negative in negatives]
            else:
                assert by_text[query] & by_text[passage]
                assert query not in (passage, *negatives)

    # Negatives are of the program and share words: "North Korea" beside "North Macedonia".
    assert sum(shared) > 0.2 * len(shared) > 0


def test_whole_programs_are_held_out_and_nothing_leaks(folder):
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

    pairs = load_pairs(folder / "held_out.parquet", folder / "candidates.parquet")
    assert len(set(pairs.languages)) == len({locale_tag(locale).split("-")[0] for locale in LOCALES})
    assert {"Cyrl", "Latn", "Hans", "Hant", "Jpan", "Deva"} == set(pairs.scripts)
    queries = list(zip(pairs.languages, pairs.scripts, map(normalise, pairs.queries), strict=True))
    assert len(queries) == len(set(queries)), "a query has one right answer"


def test_rows_are_limited_evenly_over_programs_and_drawn_by_the_seed(catalogs, tmp_path, folder):
    limited = build(catalogs, tmp_path / "build", rows_per_language=60, pairs_per_language=20, held_out_per_language=10)
    for name, most in ((SOURCES[0], 60), (SOURCES[1], 20), ("held_out", 10)):
        count = defaultdict(int)
        for row in rows_of(limited, name):
            count[row["lang"], row["script"]] += 1
        assert set(count) and max(count.values()) <= most
    domains = [row["domain"] for row in rows_of(limited, SOURCES[0])]
    assert max(map(domains.count, set(domains))) < 1.5 * min(map(domains.count, set(domains)))
    # The same options give the same bytes.
    again, other = build(catalogs, tmp_path / "again"), build(catalogs, tmp_path / "other", seed=1)
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert rows_of(other, SOURCES[0]) != rows_of(folder, SOURCES[0])


def test_what_cannot_be_built(tmp_path):
    def refuse(match, **options):
        with pytest.raises(UserError, match=match):
            build(tmp_path / "locale", tmp_path / "build", **options)
        assert not (tmp_path / "build").exists()

    refuse(r"0 programs, too few .*language packs.*'locale_dirs'")
    land = [("Color of the land", "Farbe des Landes")]
    write_catalog(tmp_path / "locale", "de", "one", land)
    refuse("1 programs, too few")
    write_catalog(tmp_path / "locale", "de", "two", land)
    refuse("1 messages to train on and 0 to hold out")
    for domain, verb, wort in (("one", "Open", "öffnen"), ("two", "Close", "schließen")):
        messages = [(f"{verb} {name}", f"{name} {wort}") for name in ("Albania", "Brazil", "Chad", "Denmark")]
        write_catalog(tmp_path / "locale", "de", domain, messages)
    refuse("lower 'num_negatives'", num_negatives=4)
    build(tmp_path / "locale", tmp_path / "three", num_negatives=3)
