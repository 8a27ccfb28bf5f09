"""Evaluation texts in training rows: each planted leak is found where it lies, whole texts and runs apart."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.training.data.cleaning.planted import HERE, clean_rows, sentence, write_manifest
from training.data.cleaning.contamination import GRAM, find_contamination
from training.data.cleaning.evaluation_texts import evaluation_file
from training.data.cleaning.normalise import tokens
from training.data.manifest import load_manifest


def evaluation_set(folder, texts, name="questions.txt"):
    (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8")
    return evaluation_file(str(folder / name))


def find(folder, rows, *sets, negatives=False):
    (source,) = load_manifest(write_manifest(folder, {"a": [rows]}))
    return find_contamination(source.files, sets, folder / "work", negatives, HERE)


def matches(found):
    """Row, column, and whether the text is a whole one."""
    return list(found[1][["row", "column", "whole"]].itertuples(index=False, name=None))


@pytest.fixture
def texts():
    rng = np.random.default_rng(99)
    long = [sentence(rng, count, script) for script in ("Latn", "Hani", "Thai") for count in (20, 60)]
    return [*long, "who was first", sentence(rng, GRAM), sentence(rng, 9, "Hani")]


@pytest.mark.parametrize("text", range(6))
def test_a_run_inside_a_passage_is_found_in_every_script(tmp_path, texts, text):
    rows, leaks = clean_rows(0), evaluation_set(tmp_path, texts)
    run = tokens(texts[text])[3 : 3 + GRAM]
    space = " " if text < 2 else ""
    rows[7][1] = f"It is said: {space.join(run).upper()}, and so on."
    assert matches(find(tmp_path, rows, leaks)) == [(7, "passage", False)]
    rows[7][1] = f"It is said: {space.join(run[:-1]).upper()}, and so on."
    assert matches(find(tmp_path, rows, leaks)) == []


def test_whole_texts_are_apart_from_runs(tmp_path, texts):
    rows = clean_rows(0)
    rows[3][0] = "Who was first?"
    rows[4][1] = "Well, who was first?"
    rows[5][1] = f"«{texts[1].upper()}»"
    rows[6][1] = f"Well, {texts[1]}"
    rows[8] = [texts[7], f"{texts[7]}, {texts[7]}"]
    found = find(tmp_path, rows, evaluation_set(tmp_path, texts))
    parts = [(3, "query", True), (5, "passage", True), (6, "passage", False), (8, "passage", False), (8, "query", True)]
    assert matches(found) == parts


def test_every_set_and_column_is_named(tmp_path, texts):
    (tmp_path / "pairs.csv").write_text(f"q,a\nwho was first,{texts[1]}\n", encoding="utf-8")
    rows = clean_rows(0)
    rows[2] = ["who was first", f"it was {texts[1]}"]
    sets = evaluation_set(tmp_path, texts), evaluation_file(f"{tmp_path}/pairs.csv:q,a")
    counts, leaks = find(tmp_path, rows, *sets)
    assert counts == {"questions.txt": 9, "pairs.csv": 2}
    columns = ["row", "column", "evaluation_set", "evaluation_column", "whole"]
    assert leaks[columns].values.tolist() == [
        [2, "passage", "questions.txt", "line", False],
        [2, "passage", "pairs.csv", "a", False],
        [2, "query", "questions.txt", "line", True],
        [2, "query", "pairs.csv", "q", True],
    ]


def test_a_further_positive_leaks_too(tmp_path):
    columns = {
        "query": ["a", "b"],
        "passage": ["c", "d"],
        "positive_2": [None, "Who was first?"],
        "negative_1": ["e"] * 2,
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    leaks = evaluation_set(tmp_path, ["who was first"])
    found = find_contamination([tmp_path / "a.parquet"], [leaks], tmp_path / "work", False, HERE)
    assert matches(found) == [(1, "positive_2", True)]


def test_negatives_on_request_and_sets_that_are_refused(tmp_path, refuses):
    rows, leaks = clean_rows(0), evaluation_set(tmp_path, ["Negative 3"])
    assert matches(find(tmp_path, rows, leaks)) == []
    assert matches(find(tmp_path, rows, leaks, negatives=True)) == [(3, "negative_1", True)]
    with refuses("'questions.txt'", "holds no text"):
        find(tmp_path, clean_rows(0), evaluation_set(tmp_path, ["", " "]))
    (tmp_path / "other").mkdir()
    sets = [evaluation_set(folder, ["a"]) for folder in (tmp_path, tmp_path / "other")]
    with refuses("'questions.txt'", "rename"):
        find(tmp_path, clean_rows(0), *sets)
