"""The CLDR data: complete rows, no false negatives, held-out names nowhere in training, the same bytes every time."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from babel import localedata
from babel.core import get_global

from tests.training.data.mining.mining_helpers import negatives_of
from training.common.errors import UserError
from training.common.languages import iso639_3, macrolanguage
from training.data.cldr.draws import draw_distinct
from training.data.cldr.names import read_names
from training.data.cldr.sources import LABELS, SOURCES, build_cldr
from training.data.cleaning.normalise import normalise
from training.data.manifest import MANIFEST, load_manifest
from training.data.published import PublishedFile

# Related and unrelated languages, five scripts, and Corsican with too few scripts and currencies to draw from.
LANGUAGES = ["ar", "co", "da", "de", "fr", "lb", "no", "nl", "sr", "sv", "sw", "zh"]
NUM_NEGATIVES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_cldr(tmp_path_factory.mktemp("cldr") / "build", languages=LANGUAGES)


@pytest.fixture(scope="module")
def names():
    return read_names(0, LANGUAGES)


@pytest.fixture(scope="module")
def sources(folder):
    """The rows of each source with texts in normal form, but for the labels."""
    rows = {source.name: pq.read_table(source.files[0]).to_pylist() for source in load_manifest(folder / MANIFEST)}
    for row in (row for each in rows.values() for row in each):
        row.update({column: normalise(text) for column, text in row.items() if column != "lang"})
    return rows


@pytest.fixture(scope="module")
def concepts_of(names):
    """Normal form -> every concept it names, in any language."""
    concepts = defaultdict(set)
    for text, concept in zip(names.texts, names.concept.tolist(), strict=True):
        concepts[normalise(text)].add(names.concepts[concept])
    return concepts


def test_manifest_columns_and_held_out_names(folder, sources, names, concepts_of):
    codes = {iso639_3(language) for language in LANGUAGES}
    entries = load_manifest(folder / MANIFEST)
    assert [source.name for source in entries] == list(SOURCES)
    for source in entries:
        count = 1 if source.task_type == "classification" else NUM_NEGATIVES
        expected = ["query", "passage", *(f"negative_{number}" for number in range(1, count + 1)), "lang"]
        rows = sources[source.name]
        assert list(rows[0]) == expected and source.licence == "Unicode-3.0"
        assert {row["lang"] for row in rows} <= set(source.languages) <= codes | {"eng"}
        # Reads every row, and refuses null, empty and blank texts.
        assert sum(map(len, PublishedFile(source.files[0], required_negatives=count).batches())) > 1000
        for row in rows:
            texts = [row["query"], row["passage"], *negatives_of(row)]
            assert len(set(texts)) == len(texts), f"{source.name}: {row}"
    # Rows without enough negatives are dropped and counted.
    assert "cos" not in {row["lang"] for row in sources["cldr_territory_currency"]}
    record = json.loads((folder / "build.json").read_text())
    assert record["dropped"]["cldr_territory_currency"] > 0
    assert record["rows"] == {name: len(rows) for name, rows in sources.items()}
    rows = pq.read_table(folder / "held_out.parquet").to_pylist()
    candidates = pq.read_table(folder / "candidates.parquet")["passage"].to_pylist()
    english = {names.texts[row] for row in names.english}
    assert len(candidates) == len(set(candidates)) and set(candidates) == english
    assert 0.03 < len(rows) / len(names.texts) < 0.1
    folded = set(map(normalise, english))
    for row in rows:
        assert row["passage"] in english and row["lang"] != "eng"
        assert normalise(row["query"]) not in folded
        assert {kind for kind, _ in concepts_of[normalise(row["query"])]} == {row["kind"]}
    assert {("zho", "Hans"), ("srp", "Cyrl"), ("deu", "Latn")} <= {(row["lang"], row["script"]) for row in rows}


def test_translations_are_right_and_their_negatives_wrong(sources, concepts_of):
    same = []
    for row in sources["cldr_translation"] + sources["cldr_translation_pairs"]:
        query, passage = concepts_of[row["query"]], concepts_of[row["passage"]]
        assert query & passage, row
        for negative in negatives_of(row):
            assert not concepts_of[negative] & (query | passage), row
            same.append(bool({kind for kind, _ in passage} & {kind for kind, _ in concepts_of[negative]}))
    # Most negatives are of the same kind.
    assert 0.7 < np.mean(same) < 0.9


def test_what_is_true_of_a_territory_is_no_negative_and_classes_do_not_mix(sources, concepts_of, names):
    currencies, languages = get_global("territory_currencies"), get_global("territory_languages")
    current = {place: {code for code, _, end, _ in all_of if end is None} for place, all_of in currencies.items()}
    spoken = {place: set(map(macrolanguage, all_of)) for place, all_of in languages.items()}
    for kind, true_of, code_of in (("currency", current, str), ("language", spoken, macrolanguage)):
        for row in sources[f"cldr_territory_{kind}"]:
            places = [code for each, code in concepts_of[row["query"]] if each == "territory"]
            true = {code for place in places for code in true_of.get(place, ())}
            for text in negatives_of(row):
                assert not {code_of(code) for each, code in concepts_of[text] if each == kind} & true, row
            assert {code_of(code) for each, code in concepts_of[row["passage"]] if each == kind} & true, row
    for row in sources["cldr_kind"]:
        kinds = [{kind for kind, _ in concepts_of[row[column]]} for column in ("query", "passage")]
        assert kinds[0] == kinds[1] and len(kinds[0]) == 1, row
        assert not any(kind in kinds[0] for text in negatives_of(row) for kind, _ in concepts_of[text]), row
    languages = defaultdict(set)
    for text, language in zip(names.texts, names.language.tolist(), strict=True):
        languages[normalise(text)].add(names.codes[language])
    for row in sources["cldr_same_language"]:
        assert languages[row["query"]] == languages[row["passage"]] == {row["lang"]}, row
        assert not any(row["lang"] in languages[text] for text in negatives_of(row)), row
    balance, labels = Counter(), list(map(normalise, LABELS))
    for row in sources["cldr_is_territory"]:
        is_territory = bool(labels.index(row["passage"]))
        assert {row["passage"], row["negative_1"]} == set(labels)
        assert {kind == "territory" for kind, _ in concepts_of[row["query"]]} == {is_territory}, row
        balance[row["lang"]] += 1 if is_territory else -1
    assert not any(balance.values())


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_held_out_texts_are_nowhere_in_training(folder, tmp_path, full):
    if full:
        folder = build_cldr(tmp_path / "full")
        record = json.loads((folder / "build.json").read_text())
        assert record["languages"] >= 240 and record["held_out"] > 10_000
        assert sum(record["rows"].values()) > 700_000
    held_out = {normalise(text) for text in pq.read_table(folder / "held_out.parquet")["query"].to_pylist()}
    assert held_out
    for source in load_manifest(folder / MANIFEST):
        table = pq.read_table(source.files[0])
        for column in set(table.column_names) - {"lang"}:
            texts = map(normalise, table[column].unique().to_pylist())
            assert held_out.isdisjoint(texts), f"{source.name}, {column}"


def test_same_options_same_bytes_and_another_seed_others(folder, tmp_path):
    again = build_cldr(tmp_path / "again", languages=LANGUAGES[::-1])
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == contents
    one, other = (build_cldr(tmp_path / str(seed), seed=seed, num_negatives=2, languages=["de"]) for seed in (1, 2))
    for name in ("cldr_territory_currency", "held_out"):
        tables = [pq.read_table(each / f"{name}.parquet") for each in (one, other)]
        assert not tables[0].equals(tables[1])
    negatives = [name for name in pq.read_schema(one / "cldr_kind.parquet").names if name.startswith("negative")]
    assert negatives == ["negative_1", "negative_2"]
    with pytest.raises(UserError, match="languages"):
        build_cldr(tmp_path / "build", languages=["de", "qqq"])
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("pool_size", [3, 6, 40, 400])
def test_draws_are_complete_exactly_where_they_can_be(pool_size):
    keys = np.arange(1000, dtype=np.uint64)
    pools = np.arange(pool_size), np.arange(pool_size, pool_size + 2)
    identity = np.arange(pool_size + 2) // 2

    def drawn(rows):
        # Row r may have the items of the first r % 5 identities only.
        allowed = lambda row, item: identity[item] < rows[row] % 5  # noqa: E731
        return draw_distinct(keys[rows], np.zeros(len(rows), dtype=int), lambda _: pools, identity, 3, allowed)

    every = drawn(np.arange(1000))
    possible = np.minimum(np.arange(1000) % 5, len(set(identity)))
    np.testing.assert_array_equal(every[:, 0] >= 0, possible >= 3)
    assert all(len(set(row)) == 3 for row in identity[every[every[:, 0] >= 0]].tolist())
    # The draw of a row does not depend on the other rows.
    np.testing.assert_array_equal(drawn(np.array([503]))[0], every[503])


def test_names_do_not_depend_on_who_read_the_locale_before():
    # babel keeps a locale as the first caller asked for it: Nynorsk with or without what it inherits from Norwegian.
    inherited = localedata.load("nn", merge_inherited=True)["languages"]
    names = read_names(0, ["nn"])
    own = {names.texts[row] for row in np.flatnonzero(~names.is_english)}
    assert 50 <= len(own) < len(inherited)
    assert localedata.load("nn")["languages"] is inherited
    assert macrolanguage("tl") == macrolanguage("fil") and macrolanguage("prs") == macrolanguage("fa_AF")
