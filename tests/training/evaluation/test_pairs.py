"""Whatever passage of its query is found is right, in the table, in training and in the tasks of local files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import ndcg_score

from training.evaluation.local.bitext import any_to_any, with_passages
from training.evaluation.local.pair_file import PairRows
from training.evaluation.local.pair_tasks import pair_tasks
from training.evaluation.pairs import EncodedPairs, Pairs, evaluate_pairs, load_pairs, nearest, ranking_scores

# "dollar" has two passages, one of them in two spellings; the same text in another language has a third.
ROWS = {
    "query": ["dollar", "dollar", "dollar", "euro"],
    "passage": ["US dollar", "Canadian dollar", "dollar sign", "Euro"],
    "lang": ["de", "de", "fr", "de"],
    "script": ["Latn"] * 4,
}
CANDIDATES = ["Euro", "US Dollar", "us dollar.", "Canadian dollar", "dollar sign", "yen", "US dollar"]


def _files(folder: Path, rows: dict[str, list[str]] = ROWS) -> tuple[Path, Path]:
    pq.write_table(pa.table(rows), folder / "pairs.parquet")
    pq.write_table(pa.table({"passage": CANDIDATES}), folder / "candidates.parquet")
    return folder / "pairs.parquet", folder / "candidates.parquet"


def test_any_passage_of_a_query_is_a_hit(tmp_path: Path) -> None:
    pairs = load_pairs(*_files(tmp_path))
    assert list(zip(pairs.queries, pairs.languages, strict=True)) == [
        ("dollar", "de"),
        ("dollar", "fr"),
        ("euro", "de"),
    ]
    assert pairs.relevant == [(1, 2, 3, 4, 6), (1, 2, 3, 4, 6), (0,)]
    candidates = torch.eye(len(CANDIDATES))
    for place, text in enumerate(CANDIDATES):
        queries = candidates[[place, place, 0]]
        result = evaluate_pairs(EncodedPairs(pairs, queries, candidates, 1.0), np.zeros(3, bool), [7])
        expected = 1.0 if text not in ("Euro", "yen") else 1 / 3
        assert result["accuracy"]["7"] == pytest.approx(expected, abs=1e-4) and result["pairs"] == 3
        assert ranking_scores(queries, candidates, pairs, 7)[0] == pytest.approx(expected)


def test_the_passages_of_one_row_in_two_spellings_are_both_right(tmp_path: Path) -> None:
    # The smallest case: the nearest candidate is the second passage of the query.
    pq.write_table(pa.table({"query": ["q", "q"], "passage": ["one", "two"]}), tmp_path / "pairs.parquet")
    pairs = load_pairs(tmp_path / "pairs.parquet")
    assert (pairs.queries, pairs.languages, pairs.scripts) == (["q"], None, None)
    assert pairs.hits(np.array([1])).all() and pairs.hits(np.array([0])).all()


def test_ndcg_of_several_passages_is_that_of_scikit_learn() -> None:
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
        assert (
            accuracy
            == pairs.hits(nearest(queries, candidates, dim)).mean()
            == gains[range(40), cosines.argmax(1)].mean()
        )


def test_a_script_that_is_not_given_is_the_usual_one(tmp_path: Path) -> None:
    rows = {**ROWS, "lang": ["de", "ru", "und", "Klingon!"]}
    del rows["script"]
    assert load_pairs(*_files(tmp_path, rows)).scripts == ["Latn", "Cyrl", "Zyyy", "Zyyy"]


def test_a_passage_that_is_no_candidate_is_refused(tmp_path: Path, refuses) -> None:
    files = _files(tmp_path, {**ROWS, "passage": ["US dollar", "Canadian dollar", "franc", "Euro"]})
    with refuses("pairs.parquet: row 2, column 'passage' is not among the candidates", "candidates.parquet"):
        load_pairs(*files)


def test_retrieval_over_local_files_has_the_same_answers(tmp_path: Path) -> None:
    pairs, candidates = _files(tmp_path)
    task = pair_tasks(pairs, "Local", candidates)[0]
    expected = {"dollar": {"US Dollar", "us dollar.", "US dollar", "Canadian dollar", "dollar sign"}, "euro": {"Euro"}}
    for code, count in (("deu-Latn", 2), ("fra-Latn", 1)):
        data = task.dataset[code]["test"]
        texts = dict(zip(data["corpus"]["id"], data["corpus"]["text"], strict=True))
        queries = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
        found = {queries[name]: {texts[each] for each in own} for name, own in data["relevant_docs"].items()}
        assert len(found) == count and found.items() <= expected.items()


def test_a_bitext_leaves_a_text_one_right_answer() -> None:
    rows = PairRows(["a", "a", "b", "c"], ["1", "2", "2", "3"], [[]] * 4, ["deu-Latn"] * 4, None)
    # "2" is a passage of "a", too: beside "1" it would be a second answer.
    assert with_passages(rows) == {"deu-Latn": (("deu-Latn",), {"a": "1", "c": "3"})}


def test_texts_of_two_languages_have_one_answer_through_every_passage() -> None:
    count = 12
    german, french = [f"de{row}" for row in range(count)], [f"fr{row}" for row in range(count)]
    passages = [f"en{row}" for row in range(count)]
    # "de0" has the passage of "fr1", too.
    queries, shared = [*german, "de0", *french], [*passages, "en1", *passages]
    codes = ["deu-Latn"] * (count + 1) + ["fra-Latn"] * count
    rows = PairRows(queries, shared, [[]] * len(queries), codes, ["eng-Latn"] * len(queries))
    [(languages, found)] = any_to_any(rows).values()
    own, other = (german, french) if languages[0] == "deu-Latn" else (french, german)
    assert found == dict(zip(own[0:1] + own[2:], other[0:1] + other[2:], strict=True))
