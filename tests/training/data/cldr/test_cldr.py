"""The CLDR data: complete rows, no false negatives, held-out names nowhere in training, the same bytes every time."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from babel import localedata
from babel.core import get_global

from training.common.errors import UserError
from training.common.languages import iso639_3, macrolanguage, script_of
from training.data.cldr.draws import draw_distinct
from training.data.cldr.names import CldrNames, read_names
from training.data.cldr.sources import LABELS, SOURCES, build_cldr
from training.data.cleaning.normalise import normalise
from training.data.manifest import MANIFEST, load_manifest
from training.data.published import PublishedFile

# Related and unrelated languages, five scripts, and Corsican with too few scripts and currencies to draw from.
LANGUAGES = ["ar", "co", "da", "de", "fr", "lb", "no", "nl", "sr", "sv", "sw", "zh"]
NUM_NEGATIVES = 24
Rows = list[dict[str, str]]
Concepts = dict[str, set[tuple[str, str]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cldr(tmp_path_factory.mktemp("cldr") / "build", languages=LANGUAGES)


@pytest.fixture(scope="module")
def names() -> CldrNames:
    return read_names(0, LANGUAGES)


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Rows]:
    return {source.name: pq.read_table(source.files[0]).to_pylist() for source in load_manifest(folder / MANIFEST)}


@pytest.fixture(scope="module")
def concepts_of(names: CldrNames) -> Concepts:
    """Normal form -> every concept it names, in any language."""
    concepts = defaultdict(set)
    for text, concept in zip(names.texts, names.concept.tolist(), strict=True):
        concepts[normalise(text)].add(names.concepts[concept])
    return concepts


def negatives_of(row: dict[str, str]) -> list[str]:
    return [normalise(text) for column, text in row.items() if column.startswith("negative_")]


def codes_named(concepts: set[tuple[str, str]], kind: str) -> set[str]:
    return {code for each, code in concepts if each == kind}


def test_manifest_and_columns(folder: Path) -> None:
    sources = load_manifest(folder / MANIFEST)
    assert [source.name for source in sources] == list(SOURCES)
    codes = {iso639_3(language) for language in LANGUAGES}
    for source in sources:
        count = 1 if source.task_type == "classification" else NUM_NEGATIVES
        expected = ["query", "passage", *(f"negative_{number}" for number in range(1, count + 1)), "lang"]
        assert pq.read_schema(source.files[0]).names == expected
        assert source.licence == "Unicode-3.0"
        assert source.languages == sorted(source.languages)
        assert set(pq.read_table(source.files[0])["lang"].to_pylist()) <= set(source.languages) <= codes | {"eng"}
        # Reads every row, and refuses null, empty and blank texts.
        assert sum(map(len, PublishedFile(source.files[0], required_negatives=count).batches())) > 1000


def test_rows_consist_of_distinct_texts(sources: dict[str, Rows]) -> None:
    for name, rows in sources.items():
        for row in rows:
            texts = [normalise(row["query"]), normalise(row["passage"]), *negatives_of(row)]
            assert len(set(texts)) == len(texts), f"{name}: {row}"


def test_translations_are_right_and_their_negatives_wrong(sources: dict[str, Rows], concepts_of: Concepts) -> None:
    same = []
    for row in sources["cldr_translation"] + sources["cldr_translation_pairs"]:
        query, passage = concepts_of[normalise(row["query"])], concepts_of[normalise(row["passage"])]
        assert query & passage, row
        for negative in negatives_of(row):
            assert not concepts_of[negative] & (query | passage), row
            same.append(bool({kind for kind, _ in passage} & {kind for kind, _ in concepts_of[negative]}))
    # Most negatives are of the same kind.
    assert 0.7 < np.mean(same) < 0.9


def test_what_is_true_of_a_territory_is_no_negative(sources: dict[str, Rows], concepts_of: Concepts) -> None:
    currencies, languages = get_global("territory_currencies"), get_global("territory_languages")
    facts = {
        "currency": {
            place: {code for code, _, end, _ in all_of if end is None} for place, all_of in currencies.items()
        },
        "language": {place: set(map(macrolanguage, all_of)) for place, all_of in languages.items()},
    }
    for kind, true_of in facts.items():
        for row in sources[f"cldr_territory_{kind}"]:
            places = codes_named(concepts_of[normalise(row["query"])], "territory")
            true = {code for place in places for code in true_of.get(place, ())}
            answers = [codes_named(concepts_of[text], kind) for text in (normalise(row["passage"]), *negatives_of(row))]
            if kind == "language":
                answers = [set(map(macrolanguage, codes)) for codes in answers]
            assert [bool(codes & true) for codes in answers] == [True] + [False] * NUM_NEGATIVES, row


def test_kinds_do_not_mix(sources: dict[str, Rows], concepts_of: Concepts) -> None:
    for row in sources["cldr_kind"]:
        kinds = [{kind for kind, _ in concepts_of[normalise(row[column])]} for column in ("query", "passage")]
        assert kinds[0] == kinds[1] and len(kinds[0]) == 1, row
        assert not any(kind in kinds[0] for text in negatives_of(row) for kind, _ in concepts_of[text]), row


def test_languages_do_not_mix(sources: dict[str, Rows], names: CldrNames) -> None:
    languages = defaultdict(set)
    for text, language in zip(names.texts, names.language.tolist(), strict=True):
        languages[normalise(text)].add(names.codes[language])
    for row in sources["cldr_same_language"]:
        assert languages[normalise(row["query"])] == languages[normalise(row["passage"])] == {row["lang"]}, row
        assert not any(row["lang"] in languages[text] for text in negatives_of(row)), row


def test_territory_labels_are_true_and_balanced(sources: dict[str, Rows], concepts_of: Concepts) -> None:
    balance = defaultdict(int)
    for row in sources["cldr_is_territory"]:
        is_territory = bool(LABELS.index(row["passage"]))
        assert {row["passage"], row["negative_1"]} == set(LABELS)
        assert {kind == "territory" for kind, _ in concepts_of[normalise(row["query"])]} == {is_territory}, row
        balance[row["lang"]] += 1 if is_territory else -1
    assert not any(balance.values())


def test_held_out_names(folder: Path, names: CldrNames, concepts_of: Concepts) -> None:
    rows = pq.read_table(folder / "held_out.parquet").to_pylist()
    candidates = pq.read_table(folder / "candidates.parquet")["passage"].to_pylist()
    english = {names.texts[row] for row in names.english}
    assert len(candidates) == len(set(candidates)) and set(candidates) == english
    assert 0.03 < len(rows) / len(names.texts) < 0.1
    assert set(rows[0]) == {"query", "passage", "lang", "script", "kind"}
    folded = set(map(normalise, english))
    for row in rows:
        assert row["passage"] in english and row["lang"] != "eng"
        assert normalise(row["query"]) not in folded
        ((kind, _),) = concepts_of[normalise(row["query"])]
        assert kind == row["kind"]
    assert {("zho", "Hans"), ("srp", "Cyrl"), ("deu", "Latn")} <= {(row["lang"], row["script"]) for row in rows}


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_held_out_texts_are_nowhere_in_training(folder: Path, tmp_path: Path, full: bool) -> None:
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


def test_two_builds_are_the_same_bytes_and_a_finished_one_is_kept(folder: Path, tmp_path: Path) -> None:
    again = build_cldr(tmp_path / "again", languages=LANGUAGES[::-1])
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build_cldr(str(folder), languages=LANGUAGES) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="other languages, seed"):
        build_cldr(folder, seed=1)


def test_seed_and_number_of_negatives(tmp_path: Path) -> None:
    one, other = (build_cldr(tmp_path / str(seed), seed=seed, num_negatives=2, languages=["de"]) for seed in (1, 2))
    tables = [pq.read_table(folder / "cldr_territory_currency.parquet") for folder in (one, other)]
    assert "negative_2" in tables[0].column_names and "negative_3" not in tables[0].column_names
    assert not tables[0].equals(tables[1])
    held_out = [pq.read_table(folder / "held_out.parquet")["query"].to_pylist() for folder in (one, other)]
    assert held_out[0] != held_out[1]


def test_rows_without_enough_negatives_are_dropped_and_counted(
    sources: dict[str, Rows], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "cos" not in {row["lang"] for row in sources["cldr_territory_currency"]}
    with caplog.at_level("INFO"):
        folder = build_cldr(tmp_path / "build", languages=["co"])
    record = json.loads((folder / "build.json").read_text())
    assert record["dropped"]["cldr_territory_currency"] > 0
    for name in record["rows"]:
        assert f"{name}: {record['rows'][name]} rows" in caplog.text
    assert "with fewer than 24 possible negatives" in caplog.text


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setitem(SOURCES, "cldr_is_territory", SOURCES["cldr_is_territory"]._replace(draw=fail))
    with pytest.raises(RuntimeError, match="disk full"):
        build_cldr(tmp_path / "build", languages=["de"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"num_negatives": 0}, "num_negatives"),
        ({"languages": ["de", "qqq"]}, "qqq"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_cldr(tmp_path / "build", **options)
    assert not any(tmp_path.iterdir())


def test_ambiguous_names_are_confusable(names: CldrNames) -> None:
    index = {concept: position for position, concept in enumerate(names.concepts)}
    assert names.confusable[index["language", "jv"], index["script", "Java"]]
    assert not names.confusable[index["territory", "DE"], index["territory", "FR"]]
    # No name is so ambiguous that few negatives would be left.
    assert names.confusable.sum(axis=1).max() < 10


@pytest.mark.parametrize("pool_size", [3, 4, 6, 40, 400])
def test_draws_are_complete_exactly_where_they_can_be(pool_size: int) -> None:
    keys = np.arange(1000, dtype=np.uint64)
    pools = np.arange(pool_size), np.arange(pool_size, pool_size + 2)
    identity = np.arange(pool_size + 2) // 2

    def drawn(rows: np.ndarray) -> np.ndarray:
        # Row r may have the items of the first r % 5 identities only.
        allowed = lambda row, item: identity[item] < rows[row] % 5  # noqa: E731
        return draw_distinct(keys[rows], np.zeros(len(rows), dtype=int), lambda _: pools, identity, 3, allowed)

    every = drawn(np.arange(1000))
    possible = np.minimum(np.arange(1000) % 5, len(set(identity)))
    np.testing.assert_array_equal(every[:, 0] >= 0, possible >= 3)
    assert all(len(set(row)) == 3 for row in identity[every[every[:, 0] >= 0]].tolist())
    # The draw of a row does not depend on the other rows.
    np.testing.assert_array_equal(drawn(np.array([503]))[0], every[503])


def test_names_do_not_depend_on_who_read_the_locale_before() -> None:
    # babel keeps a locale as the first caller asked for it: Nynorsk with or without what it inherits from Norwegian.
    inherited = localedata.load("nn", merge_inherited=True)["languages"]
    names = read_names(0, ["nn"])
    own = {
        text for text, language in zip(names.texts, names.language, strict=True) if names.languages[language] == "nn"
    }
    assert 50 <= len(own) < len(inherited)
    assert localedata.load("nn")["languages"] is inherited


def test_language_codes() -> None:
    assert [iso639_3(tag) for tag in ("de", "zh_Hant", "yue", "fil")] == ["deu", "zho", "yue", "fil"]
    assert [script_of(tag) for tag in ("sr", "sr_Latn", "zh", "yue")] == ["Cyrl", "Latn", "Hans", "Hant"]
    assert macrolanguage("tl") == macrolanguage("fil") and macrolanguage("prs") == macrolanguage("fa_AF")
    for function, tag in [(iso639_3, "xx"), (iso639_3, "$"), (script_of, "$"), (macrolanguage, "$")]:
        with pytest.raises(ValueError, match="use a tag"):
            function(tag)
