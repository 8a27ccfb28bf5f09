"""Local files as mteb's tasks: scores are those of numpy and scikit-learn, languages are told, faults are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score, ndcg_score

pytest.importorskip("mteb")

from sentence_transformers import SentenceTransformer

from modeling_f2llm.prompts import instruct
from tests.training.data.gettext_catalogs.gettext_folders import write_catalogs
from tests.training.evaluation.local_runs import column_of, cosines, evaluate, text, without_prompts, write
from training.common.keyed import text_key
from training.data.cldr.build import build_cldr
from training.data.gettext_catalogs.build import build_gettext
from training.evaluation.local_tasks import local_tasks
from training.evaluation.summary import summarize

Refuses = Callable[..., AbstractContextManager[None]]

# mteb rounds scores of retrieval to five places.
ROUNDED = {"abs": 1e-5}


@pytest.fixture
def model(tiny_model, tiny_tokenizer) -> SentenceTransformer:
    return without_prompts(tiny_model, tiny_tokenizer)


def mined(model: SentenceTransformer, one: list[str], other: list[str]) -> float:
    """F1 of a bitext whose sides are in one order."""
    nearest = cosines(model, one, other).argmax(axis=1)
    return f1_score(np.arange(len(one)), nearest, average="weighted", zero_division=0)


def test_languages_that_share_passages_are_mined_against_one_another(
    model: SentenceTransformer, tmp_path: Path
) -> None:
    # The first three share twelve passages; Icelandic shares nine with them, too few.
    own = {"deu": range(12), "fra": range(12), "rus": range(12), "isl": range(3, 21)}
    rows = [(text(code, number), text("eng", number), code) for code, numbers in own.items() for number in numbers]
    # A second German text of the first passage is no other translation.
    rows.append(("zweiter Text", text("eng", 0), "deu"))
    queries, passages, languages = zip(*rows, strict=True)
    path = write(tmp_path / "p.parquet", query=queries, passage=passages, lang=languages, passage_lang=["en"] * 55)
    found = evaluate(model, path)
    scores = {(score.task, score.languages): score for score in found.scores}
    codes = {"deu": "deu-Latn", "fra": "fra-Latn", "rus": "rus-Cyrl", "isl": "isl-Latn"}
    for code, numbers in own.items():
        bitext = scores["PBitextMining", (codes[code], "eng-Latn")]
        sides = ([text(kind, number) for number in numbers] for kind in (code, "eng"))
        assert bitext.value == pytest.approx(mined(model, *sides))
        assert bitext.examples == len(numbers)
        assert ("PRetrieval", (codes[code],)) in scores
    pairs = [score.languages for score in found.scores if score.task == "PAnyToAnyBitextMining"]
    order = sorted(set(codes.values()) - {"isl-Latn"}, key=lambda code: text_key(f"any-to-any {code}"))
    assert sorted(pairs) == sorted(pairwise([*order, order[0]]))
    for pair in pairs:
        sides = ([text(code.split("-")[0], number) for number in range(12)] for code in pair)
        assert scores["PAnyToAnyBitextMining", pair].value == pytest.approx(mined(model, *sides))
    assert {group.name: group.languages for group in summarize(found, "tiny").bitext} == {
        "English-centred": 5,
        "any-to-any": 3,
    }


def test_a_ring_over_many_languages_has_each_in_two_pairs(tmp_path: Path) -> None:
    codes = "deu fra rus isl spa ita por nld swe dan".split()
    rows = [(text(code, number), text("eng", number), code) for code in codes for number in range(15)]
    rings = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        queries, passages, languages = zip(*ordered, strict=True)
        columns = {"query": queries, "passage": passages, "lang": languages}
        known = write(tmp_path / f"{name}.parquet", **columns, passage_lang=["eng"] * 150)
        rings.append(local_tasks(known)[2].metadata.eval_langs)
    assert rings[0] == rings[1]
    assert set(Counter(code for pair in rings[0].values() for code in pair).values()) == {2}
    # Without the language of the passages, nobody knows whether they translate.
    retrieval, bitext = local_tasks(write(tmp_path / "c.parquet", **columns))
    assert bitext.metadata.eval_langs == retrieval.metadata.eval_langs
    assert all(len(languages) == 1 for languages in bitext.metadata.eval_langs.values())


def test_the_published_format(model: SentenceTransformer, tmp_path: Path) -> None:
    numbers = range(20)
    queries = [text("query", number) for number in numbers]
    passages = [text("passage", number) for number in numbers]
    negatives = {
        "negative_1": [text("negative", number % 7) for number in numbers],
        "negative_2": [None if number % 3 else passages[number - 1] for number in numbers],
        "negative_10": [None] * 20,
    }
    # Two passages answer the first query, and one query is a passage of another.
    queries[1], passages[2] = queries[0], queries[5]
    written = [instruct("Find it.", query) if number % 2 else query for number, query in enumerate(queries)]
    path = write(tmp_path / "web_qa.parquet", query=written, passage=passages, domain=["x"] * 20, **negatives)
    documents = list(dict.fromkeys([*passages, *negatives["negative_1"], *filter(None, negatives["negative_2"])]))
    distinct, pairs = list(dict.fromkeys(queries)), set(zip(queries, passages, strict=True))
    relevant = np.array([[(query, document) in pairs for document in documents] for query in distinct])
    expected = cosines(model, distinct, documents)
    # A query is no candidate of its own.
    expected[distinct.index(queries[5]), documents.index(queries[5])] = -1.0
    found = evaluate(model, path)
    (score,) = found.select(task="WebQaRetrieval")
    assert score.value == pytest.approx(ndcg_score(relevant, expected, k=10), **ROUNDED)
    assert (score.languages, score.examples) == ((), 19)
    assert not summarize(found, "tiny").languages


def test_a_text_that_is_its_own_passage_is_found(model: SentenceTransformer, tmp_path: Path) -> None:
    path = write(tmp_path / "same.parquet", query=["Togo", "Tschad"], passage=["Togo", "Chad"])
    (score,) = evaluate(model, path).select(task="SameRetrieval")
    expected = ndcg_score(np.eye(2), cosines(model, ["Togo", "Tschad"], ["Togo", "Chad"]))
    assert score.value == pytest.approx(expected, **ROUNDED)


def test_other_data_of_the_same_name_are_another_revision(tmp_path: Path) -> None:
    revisions = []
    for negative in ("x", "y", "x"):
        path = write(tmp_path / "p.parquet", query=["a", "b"], passage=["c", "d"], negative_1=[negative, "z"])
        revisions.append([task.metadata.revision for task in local_tasks(path)])
    (retrieval, bitext), (other, same), again = revisions
    assert retrieval != other and bitext == same and again == [retrieval, bitext]


@pytest.fixture(scope="module")
def cldr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cldr(tmp_path_factory.mktemp("cldr") / "build", languages=["da", "ja", "ru", "sw"])


def test_a_cldr_build(model: SentenceTransformer, cldr: Path) -> None:
    found = evaluate(model, cldr)
    assert {score.task for score in found.scores} == {
        *("CldrRetrieval", "CldrBitextMining", "CldrAnyToAnyBitextMining"),
        *("CldrScriptClassification", "CldrScriptClustering", "CldrKindClassification", "CldrKindClustering"),
    }
    codes = {"dan-Latn", "jpn-Jpan", "rus-Cyrl", "swa-Latn"}
    assert {score.languages for score in found.select(task="CldrRetrieval")} == {(code,) for code in codes}
    assert {score.languages for score in found.select(task="CldrBitextMining")} == {(c, "eng-Latn") for c in codes}
    candidates = column_of(cldr / "candidates.parquet", "passage")
    rows = [row for row in pq.read_table(cldr / "held_out.parquet").to_pylist() if row["lang"] == "swa"]
    relevant = np.array([[row["passage"] == name for name in candidates] for row in rows])
    expected = ndcg_score(relevant, cosines(model, [row["query"] for row in rows], candidates), k=10)
    (swahili,) = found.select(task="CldrRetrieval", languages=("swa-Latn",))
    assert swahili.value == pytest.approx(expected, **ROUNDED) and swahili.examples == len(rows)
    assert {group.name for group in summarize(found, "tiny").bitext} == {"English-centred", "any-to-any"}


def test_a_cldr_build_of_one_script_has_no_task_of_scripts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build_cldr(tmp_path / "build", languages=["da", "sw"])
    names = [task.metadata.name for task in local_tasks(folder)]
    assert "CldrKindClustering" in names and "CldrScriptClustering" not in names
    assert "column 'script': fewer than two labels" in caplog.text


def test_a_gettext_build(model: SentenceTransformer, tmp_path: Path) -> None:
    catalogs = write_catalogs(tmp_path / "locale", ["de", "ja", "sr", "sr@latin"])
    folder = build_gettext(tmp_path / "gettext", locale_dirs=[str(catalogs)], held_out_per_language=80)
    found = evaluate(model, folder)
    codes = {"deu-Latn", "jpn-Jpan", "srp-Cyrl", "srp-Latn"}
    assert {score.languages for score in found.select(task="GettextBitextMining")} == {(c, "eng-Latn") for c in codes}
    assert {score.languages for score in found.select(task="GettextRetrieval")} == {(code,) for code in codes}
    ring = found.select(task="GettextAnyToAnyBitextMining")
    assert {code for score in ring for code in score.languages} == codes
    assert all(10 <= score.examples <= 80 for score in ring)
    assert len({score.task for score in found.scores}) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"passage": ["b"]}, "column 'query' is missing"),
        ({"query": ["a"], "passage": [None]}, "row 0, column 'passage' is null"),
        ({"query": ["a"], "passage": ["b"], "negative_1": ["b"]}, "column 'negative_1' equals column 'passage'"),
        ({"query": ["a"], "passage": ["b"], "lang": ["English"]}, "row 0: lang 'English' names no language"),
        ({"query": ["a"], "passage": ["b"], "lang": ["deu"], "script": ["Latin"]}, "script 'Latin' names no language"),
        ({"query": ["a", "c"], "passage": ["b", "d"], "lang": ["deu", None]}, "row 1, column 'lang' is no text"),
        ({"query": ["a"], "passage": ["b"], "lang": [7]}, "column 'lang' holds int64, not text"),
        ({"query": ["a"], "passage": ["b"], "passage_lang": ["de"], "passage_script": [""]}, "is no text"),
    ],
)
def test_a_faulty_file_is_refused(columns: dict, message: str, tmp_path: Path, refuses: Refuses) -> None:
    path = write(tmp_path / "p.parquet", **columns)
    with refuses(path, message):
        local_tasks(path)


def test_what_is_no_data_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    with refuses("notes.txt", "not a readable parquet file"):
        local_tasks(tmp_path / "notes.txt")
    # What a stage reads as evaluation_pairs need not be downloaded or built again.
    (tmp_path / "pairs.csv").write_text("query,passage\na,b\n")
    with refuses("pairs.csv", "--local reads parquet files"):
        local_tasks(tmp_path / "pairs.csv")
    with refuses("absent", "no such file or folder"):
        local_tasks(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    with refuses("folder", "held_out.parquet", "candidates.parquet", "source.json"):
        local_tasks(tmp_path / "folder")
