"""Rows of several positives: all of them count, documents are told apart by id, and columns stay with their texts."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from tests.training.data.mining.mining_helpers import (
    negatives_of,
    random_vectors,
    read_output,
    save_vectors,
    write_pairs,
)
from training.data.mining.mining import mine
from training.data.mining.search import MiningOptions
from training.models.encoders import find_miner

QUERIES, PASSAGES = [f"q{number}" for number in range(30)], [f"p{number}" for number in range(50)]
# One, two or three positives, of which some belong to several queries.
POSITIVES = [[PASSAGES[(row * 3 + k) % 50] for k in range(1 + row % 3)] for row in range(30)]
OPTIONS = MiningOptions(top=20, skip=1, max_score=0.7, negatives=5, keep_short=True)
# The first positive of each alone.
PAIRS = [(query, texts[0]) for query, texts in zip(QUERIES, POSITIVES, strict=True)]
PURE = replace(OPTIONS, max_score=1.01, relative=2.0, skip=0)


@pytest.fixture(scope="module")
def miner(tmp_path_factory):
    vectors = random_vectors([*QUERIES, *PASSAGES])
    for query, positives in zip(QUERIES, POSITIVES, strict=True):
        vectors[query] += 3 * sum(vectors[each] for each in positives)
    return find_miner(str(save_vectors(tmp_path_factory.mktemp("model"), vectors)))


@pytest.fixture
def run(miner, tmp_path):
    def run(name, pairs, options=OPTIONS, bitext=(), **more):
        source = write_pairs(tmp_path / f"{name}-source", pairs, more=more)
        report = mine([source], miner, tmp_path / name, options, bitext=bitext)["sources"]["pairs"]
        return read_output(tmp_path / name), report

    return run


def columns(number):
    """The positives as columns: ``passage``, ``positive_2`` …, null where a row has none."""
    return [[row[k] if k < len(row) else None for row in POSITIVES] for k in range(number)]


def test_they_are_mined_as_several_rows_are(run):
    _, second, third = columns(3)
    # Columns in any order.
    rows, report = run("wide", PAIRS, positive_3=third, positive_2=second)
    pairs = [(query, text) for query, texts in zip(QUERIES, POSITIVES, strict=True) for text in texts]
    long, expected = run("long", pairs)
    assert {row["query"]: negatives_of(row) for row in rows} == {row["query"]: negatives_of(row) for row in long}
    assert report["texts"] == expected["texts"] and report["refused"] == expected["refused"]
    assert (report["rows"], expected["rows"]) == (30, 60) and expected["refused"]["positive"] > 50
    assert [(row["passage"], row["positive_2"], row["positive_3"]) for row in rows] == list(
        zip(*columns(3), strict=True)
    )


def test_translations_of_every_positive_are_guarded(run, tmp_path):
    rows, _ = run("plain", PAIRS, PURE)
    negative = negatives_of(rows[0])[0]
    bitext = write_pairs(tmp_path / "bitext", [("elsewhere", "here")], name="bitext", more={"positive_2": [negative]})
    bitext = [bitext, write_pairs(tmp_path / "chain", [("elsewhere", PAIRS[0][1])], name="chain")]
    rows, report = run("guarded", PAIRS, PURE, bitext)
    assert negative not in negatives_of(rows[0]) and report["refused"]["translation"] > 0


def test_texts_with_one_id_are_one_document(run):
    passage, second = columns(2)
    every = replace(PURE, top=60, negatives=60, fit=True)
    rows, _ = run("without", PAIRS, every, positive_2=second)
    twin = passage[20]
    assert twin in negatives_of(rows[1])
    # The second positive of query 1 is the document of query 20; two others are one document of their own.
    ids, second_ids = [f"d{row}" for row in range(30)], [None] * 30
    second_ids[1], ids[25] = "d20", "d24"
    rows, report = run(
        *("with", PAIRS, every),
        **{"positive_2": second, "passage_id": ids, "positive_2_id": second_ids},
    )
    assert twin not in negatives_of(rows[1]) and second[1] not in negatives_of(rows[20])
    # Only rows of which it is a positive have none of the two that are one document; all others have one of them.
    pair = {passage[24], passage[25]}
    assert [len({*negatives_of(row)} & pair) for row in rows] == [
        int(not pair & {row["passage"], row["positive_2"]}) for row in rows
    ]
    assert report["refused"]["repeated"] > 0
    assert [row["passage_id"] for row in rows] == ids and [row["positive_2_id"] for row in rows] == second_ids


@pytest.mark.parametrize("drop", [False, True])
def test_what_describes_a_negative_stays_with_it(run, drop):
    pairs = [(*pair, None, "own a", "own b") for pair in PAIRS]
    pairs[1] = (*pairs[1][:2], "own c", "own c", None)
    more = {f"negative_{k}_id": [f"{row}-{k}" for row in range(30)] for k in (1, 2, 3)}
    more |= {
        "negative_2_score": pa.array([0.25] * 30),
        "passage_score": pa.array([1.0] * 30),
        "positive_2": ["p40"] * 30,
    }
    # More than are asked for.
    more["negative_9_id"] = ["none"] * 30
    rows, _ = run("out", pairs, replace(PURE, replace=drop), **more)
    described = [tuple(row[f"negative_{k}_id"] for k in (1, 2, 3)) for row in rows]
    if drop:
        assert {*described} == {(None, None, None)} and rows[0]["negative_2_score"] is None
    else:
        assert [row["negative_2"] for row in rows[:1]] == ["own b"] and described[0] == ("0-2", "0-3", None)
        assert negatives_of(rows[1])[0] == "own c" and described[1] == ("1-1", None, None)
        # There is no column for the score of the text that moved; that of the next column is not there.
        assert [row["negative_2_score"] for row in rows] == [None] * 30
    assert [len(negatives_of(row)) for row in rows[:5]] == [5] * 5
    assert [row["passage_score"] for row in rows] == [1.0] * 30
    assert "negative_9_id" not in rows[0]


def test_a_small_corpus_is_mined_as_far_as_it_goes(run, tmp_path, miner, refuses, caplog):
    with refuses("8 distinct passages", "--fit"):
        run("strict", PAIRS[:8])
    rows, report = run("fit", PAIRS[:8], replace(PURE, fit=True))
    assert [len(negatives_of(row)) for row in rows] == [5] * 8 and report["options"]["top"] == 8
    assert run("fit", PAIRS[:8], replace(PURE, fit=True))[1] == report
    caplog.set_level("INFO")
    tiny, large = (
        write_pairs(tmp_path / name, rows, name=name) for name, rows in (("tiny", PAIRS[:2]), ("large", PAIRS))
    )
    report = mine([tiny, large], miner, tmp_path / "both", replace(OPTIONS, fit=True))
    assert [*report["sources"]] == ["large"] and "tiny: is not mined: 2 passages" in caplog.text
    assert mine([tiny], miner, tmp_path / "none", replace(OPTIONS, fit=True)) == {"sources": {}}
    assert "tiny.parquet" in (tmp_path / "none/manifest.yaml").read_text()
