"""Texts are read as they are, and any passage of a query is right: in the table, in training and in local tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import ndcg_score

from training.evaluation.pairs import (
    EncodedPairs,
    Pairs,
    evaluate_pairs,
    load_pairs,
    nearest,
    ranking_scores,
    read_texts,
)

COLUMNS = {"query": ["NA", "00001", 'a, "b"\nc'], "passage": ["null", "0.50", "大熊猫"]}


def _write(path, columns):
    frame = pd.DataFrame(columns)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False, encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.csv", "pairs.jsonl", "pairs"])
def test_texts_are_read_as_they_are_and_faults_are_named(tmp_path, name, refuses):
    with refuses(f"{name}: no such file"):
        read_texts(tmp_path / name, ["query"])
    path = _write(tmp_path / name, COLUMNS)
    assert read_texts(path, ["query"], ["passage", "lang"]) == COLUMNS
    assert read_texts(path, ["passage"]) == {"passage": COLUMNS["passage"]}
    with refuses(f"{name}: column 'lang' is missing; it has query"):
        read_texts(path, ["query", "lang"])
    with refuses(f"{name}: row 1, column 'query' is not text"):
        read_texts(_write(path, {"query": ["a", " "], "passage": ["b", "c"]}), ["query"])


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.parquet", b"no parquet", "not a readable parquet file"),
        ("a.csv", b"", "not a readable csv file"),
        ("a.csv", b"query,passage\n", "the file has no rows"),
        ("a.csv", b"query,passage\na,b\nc\n", "not a readable csv file"),
        ("a.csv", b"query,passage\na,\xff\n", "not a readable csv file"),
        ("a.csv", b"query,passage,query\na,b,c\n", "column 'query' is there twice"),
        ("a.jsonl", b"", "the file has no rows"),
        ("a.jsonl", b'{"q": "a", "id": 1}\n', "column 'query' is missing; it has q, id"),
        ("a.jsonl", b'{"query": "a", "passage": "b"}\n{"query": 42, "passage": "b"}\n', "column query"),
        ("a.jsonl", b'{"query": "a", "passage": "b"}\n{"query": "c"}\n', "row 1, column 'passage' is not text"),
        ("a.jsonl", b'{"query": "a"', "not a readable jsonl file"),
        ("a.jsonl", b'["a", "b"]\n', "column 'query' is missing"),
        ("a.jsonl", b'{"query": "\xff"}\n', "not a readable jsonl file"),
    ],
)
def test_a_faulty_file_is_one_line(tmp_path, refuses, name, content, part):
    (tmp_path / name).write_bytes(content)
    with refuses(tmp_path / name, part):
        read_texts(tmp_path / name, ["query", "passage"])


def test_json_in_parquet_is_decoded(tmp_path, refuses):
    mixed = Dataset.from_dict({"query": ["大熊猫", "x"], "passage": ["竹", 3]}, on_mixed_types="use_json")
    mixed.to_parquet(tmp_path / "pairs.parquet")
    assert read_texts(tmp_path / "pairs.parquet", ["query"]) == {"query": ["大熊猫", "x"]}
    with refuses("pairs.parquet", "row 1", "'passage'"):
        read_texts(tmp_path / "pairs.parquet", ["passage"])


# "dollar" has two passages, one of them in two spellings; the same text in another language has a third.
ROWS = {
    "query": ["dollar", "dollar", "dollar", "euro"],
    "passage": ["US dollar", "Canadian dollar", "dollar sign", "Euro"],
    "lang": ["de", "de", "fr", "de"],
    "script": ["Latn"] * 4,
}
CANDIDATES = ["Euro", "US Dollar", "us dollar.", "Canadian dollar", "dollar sign", "yen", "US dollar"]


def _files(folder, **changes):
    rows = {name: values for name, values in {**ROWS, **changes}.items() if values}
    pairs = _write(folder / "pairs.parquet", rows)
    return pairs, _write(folder / "candidates.parquet", {"passage": CANDIDATES})


def test_any_passage_of_a_query_is_a_hit(tmp_path):
    pairs = load_pairs(*_files(tmp_path))
    assert (pairs.queries, pairs.languages) == (["dollar", "dollar", "euro"], ["de", "fr", "de"])
    assert pairs.relevant == [(1, 2, 3, 4, 6), (1, 2, 3, 4, 6), (0,)]
    candidates = torch.eye(len(CANDIDATES))
    for position, text in enumerate(CANDIDATES):
        queries = candidates[[position, position, 0]]
        result = evaluate_pairs(EncodedPairs(pairs, queries, candidates, 1.0), np.zeros(3, bool), [7])
        expected = 1.0 if text not in ("Euro", "yen") else 1 / 3
        assert result["accuracy"]["7"] == pytest.approx(expected, abs=1e-4) and result["pairs"] == 3
        assert ranking_scores(queries, candidates, pairs, 7)[0] == pytest.approx(expected)


def test_a_script_that_is_not_given_is_the_usual_one(tmp_path):
    files = _files(tmp_path, lang=["de", "ru", "und", "Klingon!"], script=None)
    assert load_pairs(*files).scripts == ["Latn", "Cyrl", "Zyyy", "Zyyy"]


def test_a_passage_that_is_not_a_candidate_is_refused(tmp_path, refuses):
    files = _files(tmp_path, passage=["US dollar", "Canadian dollar", "franc", "Euro"])
    with refuses("pairs.parquet: row 2, column 'passage' is not among the candidates", "candidates.parquet"):
        load_pairs(*files)


def test_ndcg_of_several_passages_is_that_of_scikit_learn(monkeypatch):
    monkeypatch.setattr("training.evaluation.pairs._BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(40, 16, generator=generator), torch.randn(30, 16, generator=generator)
    drawn = np.random.default_rng(0)
    relevant = [tuple(sorted(drawn.choice(30, drawn.integers(1, 14), replace=False).tolist())) for _ in range(40)]
    pairs = Pairs(["q"] * 40, ["c"] * 30, relevant)
    for dim in (16, 4):
        cosines = queries[:, :dim] @ torch.nn.functional.normalize(candidates[:, :dim], dim=-1).T
        gains = np.array([np.isin(np.arange(30), own) for own in relevant])
        accuracy, ndcg = ranking_scores(queries, candidates, pairs, dim)
        assert ndcg == pytest.approx(ndcg_score(gains, cosines, k=10))
        hits = pairs.hits(nearest(queries, candidates, dim))
        assert accuracy == hits.mean() == gains[range(40), cosines.argmax(1)].mean()
