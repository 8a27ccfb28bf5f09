"""The CLDR data: whole rows, no false negatives, held-out names nowhere in training, and the same bytes every time."""

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
from training.data.cldr import build, classes
from training.data.cldr.build import build_cldr
from training.data.cldr.draws import draw_distinct
from training.data.cldr.names import CldrNames, read_names
from training.data.cleaning.normalise import normalise
from training.data.manifest import load_manifest
from training.data.published import PublishedFile

# Related and unrelated languages, five scripts, and Corsican with too few scripts and currencies to draw from.
LANGUAGES = ["ar", "co", "da", "de", "fr", "lb", "no", "nl", "sr", "sv", "sw", "zh"]
NUM_NEGATIVES = 24
Rows = list[dict[str, str]]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cldr(tmp_path_factory.mktemp("cldr") / "build", languages=LANGUAGES)


@pytest.fixture(scope="session")
def names() -> CldrNames:
    return read_names(0, LANGUAGES)


@pytest.fixture(scope="session")
def sources(folder: Path) -> dict[str, Rows]:
    return {
        source.name: pq.read_table(source.files[0]).to_pylist() for source in load_manifest(folder / build.MANIFEST)
    }


@pytest.fixture(scope="session")
def concepts_of(names: CldrNames) -> dict[str, set[tuple[str, str]]]:
    """Folded text -> every concept it names, in whatever language."""
    concepts = defaultdict(set)
    for text, concept in zip(names.texts, names.concept.tolist(), strict=True):
        concepts[normalise(text)].add(names.concepts[concept])
    return concepts


def negatives_of(row: dict[str, str]) -> list[str]:
    return [normalise(text) for column, text in row.items() if column.startswith("negative_")]


def assert_nothing_held_out_in_training(folder: Path) -> None:
    held_out = {normalise(text) for text in pq.read_table(folder / "held_out.parquet")["query"].to_pylist()}
    assert held_out
    for source in load_manifest(folder / build.MANIFEST):
        table = pq.read_table(source.files[0])
        for column in set(table.column_names) - {"lang"}:
            texts = map(normalise, table[column].unique().to_pylist())
            assert held_out.isdisjoint(texts), f"{source.name}, {column}"


def test_manifest_and_columns(folder: Path) -> None:
    sources = load_manifest(folder / build.MANIFEST)
    assert [source.name for source in sources] == [
        "cldr_translation",
        "cldr_translation_pairs",
        "cldr_territory_currency",
        "cldr_territory_language",
        "cldr_kind",
        "cldr_same_language",
        "cldr_is_territory",
    ]
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


def test_rows_hold_distinct_texts(sources: dict[str, Rows]) -> None:
    for name, rows in sources.items():
        for row in rows:
            texts = [normalise(row["query"]), normalise(row["passage"]), *negatives_of(row)]
            assert len(set(texts)) == len(texts), f"{name}: {row}"


def test_translations_are_right_and_their_negatives_wrong(sources: dict[str, Rows], concepts_of) -> None:
    for row in sources["cldr_translation"] + sources["cldr_translation_pairs"]:
        query, passage = concepts_of[normalise(row["query"])], concepts_of[normalise(row["passage"])]
        assert query & passage, row
        for negative in negatives_of(row):
            assert not concepts_of[negative] & (query | passage), row


def test_translation_negatives_are_mostly_of_the_same_kind(sources: dict[str, Rows], concepts_of) -> None:
    same = []
    for row in sources["cldr_translation"]:
        kinds = {kind for kind, _ in concepts_of[normalise(row["passage"])]}
        same += [bool(kinds & {kind for kind, _ in concepts_of[text]}) for text in negatives_of(row)]
    assert 0.7 < np.mean(same) < 0.9


def test_territories_keep_their_own_currencies_out_of_the_negatives(sources: dict[str, Rows], concepts_of) -> None:
    facts = get_global("territory_currencies")
    current = {place: {code for code, _, end, _ in currencies if end is None} for place, currencies in facts.items()}
    for row in sources["cldr_territory_currency"]:
        places = [code for kind, code in concepts_of[normalise(row["query"])] if kind == "territory"]
        used = {("currency", code) for place in places for code in current.get(place, ())}
        assert concepts_of[normalise(row["passage"])] & used, row
        assert not any(concepts_of[text] & used for text in negatives_of(row)), row


def test_territories_keep_their_own_languages_out_of_the_negatives(sources: dict[str, Rows], concepts_of) -> None:
    facts = get_global("territory_languages")
    for row in sources["cldr_territory_language"]:
        places = [code for kind, code in concepts_of[normalise(row["query"])] if kind == "territory"]
        spoken = {macrolanguage(code) for place in places for code in facts.get(place, ())}

        def is_spoken(text: str, spoken: set[str] = spoken) -> bool:
            return any(kind == "language" and macrolanguage(code) in spoken for kind, code in concepts_of[text])

        assert is_spoken(normalise(row["passage"])), row
        assert not any(map(is_spoken, negatives_of(row))), row


def test_kinds_do_not_mix(sources: dict[str, Rows], concepts_of) -> None:
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


def test_territory_labels_are_true_and_balanced(sources: dict[str, Rows], concepts_of) -> None:
    labels = {classes.IS_TERRITORY: True, classes.IS_NOT_TERRITORY: False}
    balance = defaultdict(int)
    for row in sources["cldr_is_territory"]:
        assert {row["passage"], row["negative_1"]} == set(labels)
        named = {kind == "territory" for kind, _ in concepts_of[normalise(row["query"])]}
        assert named == {labels[row["passage"]]}, row
        balance[row["lang"]] += 1 if labels[row["passage"]] else -1
    assert not any(balance.values())


def test_held_out_names(folder: Path, names: CldrNames, concepts_of) -> None:
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
        assert {kind for kind, _ in concepts_of[normalise(row["query"])]} == {row["kind"]}
        assert len(concepts_of[normalise(row["query"])]) == 1
    assert {("zho", "Hans"), ("srp", "Cyrl"), ("deu", "Latn")} <= {(row["lang"], row["script"]) for row in rows}


def test_held_out_texts_are_nowhere_in_training(folder: Path) -> None:
    assert_nothing_held_out_in_training(folder)


@pytest.mark.slow
def test_full_build(tmp_path: Path) -> None:
    folder = build_cldr(tmp_path / "full")
    assert_nothing_held_out_in_training(folder)
    record = json.loads((folder / "build.json").read_text())
    assert record["languages"] >= 240 and record["held_out"] > 10_000
    assert sum(record["rows"].values()) > 700_000


def test_two_builds_are_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = build_cldr(tmp_path / "again", languages=LANGUAGES[::-1])
    assert {path.name for path in again.iterdir()} == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_seed_and_negatives_count(tmp_path: Path) -> None:
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


def test_finished_build_is_kept(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build_cldr(str(folder), languages=LANGUAGES) == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError, match="other languages, seed"):
        build_cldr(folder, seed=1)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("keep")
    with pytest.raises(UserError, match="no finished CLDR build"):
        build_cldr(tmp_path, languages=["de"])
    with pytest.raises(UserError, match="no finished CLDR build"):
        build_cldr(precious, languages=["de"])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["keep"]


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(classes, "is_territory", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        build_cldr(tmp_path / "build", languages=["de"])
    assert not any(tmp_path.iterdir())


def test_bad_options(tmp_path: Path) -> None:
    for options, message in [
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"num_negatives": 0}, "num_negatives"),
        ({"languages": ["de", "qqq"]}, "qqq"),
    ]:
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
    first, rest = np.arange(pool_size), np.arange(pool_size, pool_size + 2)
    identity = np.arange(pool_size + 2) // 2

    def allowed(row: np.ndarray, item: np.ndarray) -> np.ndarray:
        # Row r may have the items of the first r % 5 identities only.
        return identity[item] < row % 5

    drawn = draw_distinct(keys, np.zeros(1000, dtype=int), lambda _: (first, rest), identity, 3, allowed)
    possible = np.minimum(np.arange(1000) % 5, len(set(identity)))
    np.testing.assert_array_equal(drawn[:, 0] >= 0, possible >= 3)
    complete = drawn[drawn[:, 0] >= 0]
    assert all(len(set(row)) == 3 for row in identity[complete].tolist())
    # A row's draw does not depend on the rows beside it.
    alone = draw_distinct(
        keys[503:504],
        np.zeros(1, dtype=int),
        lambda _: (first, rest),
        identity,
        3,
        lambda row, item: allowed(row + 503, item),
    )
    np.testing.assert_array_equal(alone[0], drawn[503])


def test_names_do_not_depend_on_who_read_the_locale_before() -> None:
    # babel keeps a locale as the first caller asked for it: Nynorsk with or without what it inherits from Norwegian.
    inherited = localedata.load("nn", merge_inherited=True)["languages"]
    names = read_names(0, ["nn"])
    own = {
        text
        for text, language in zip(names.texts, names.language.tolist(), strict=True)
        if names.languages[language] == "nn"
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
