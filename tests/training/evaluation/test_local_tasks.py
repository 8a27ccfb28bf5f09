"""Local data as mteb's tasks: scores are those of numpy and scikit-learn, languages are kept, faults are named."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, label_ranking_average_precision_score, ndcg_score, v_measure_score

pytest.importorskip("mteb")

import mteb

from modeling_f2llm.prompts import instruct
from tests.training.data.gettext_catalogs.gettext_folders import write_catalogs
from tests.training.evaluation.synthetic import write
from training.common.keyed import text_key
from training.data.cldr.sources import build_cldr
from training.data.gettext_catalogs.sources import build_gettext
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource
from training.evaluation.local_tasks import (
    PairRows,
    any_to_any,
    classification,
    clustering,
    labels_of,
    local_tasks,
    with_passages,
)
from training.evaluation.records import Evaluation, Score
from training.evaluation.summary import summarize

# mteb rounds scores of retrieval to five decimals.
ROUNDED = {"abs": 1e-5}
WORDS = "river größer 東京 ответ lamp čaj window שלום sugar नमस्ते seven orbit paper quiet green tower".split()


def text(kind, number):
    """A different text for each kind and number."""
    return f"{kind} {WORDS[number % 16]} {WORDS[(3 * number + len(kind)) % 16]} {number}"


def by_mteb(model, task):
    """The scores of a task by split, from mteb alone."""
    (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    return result.scores


def evaluate(model, path):
    found = Evaluation()
    for task in local_tasks(path):
        for split, subsets in by_mteb(model, task).items():
            for scores in subsets:
                data = task.dataset.get(scores["hf_subset"], task.dataset)[split]
                examples = len(data["queries"] if isinstance(data, dict) else data)
                of_task = ("tiny", task.metadata.name, task.metadata.type, scores["hf_subset"])
                metric = (task.metadata.main_score, scores["main_score"])
                found.scores.append(Score(*of_task, tuple(scores["languages"]), 32, "float32", *metric, examples))
    return found


def cosines(model, queries, documents):
    """``(queries, documents)`` cosines."""
    one, other = model.encode(list(queries)), model.encode(list(documents))
    return one @ other.T / (np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(other, axis=1))


def mined(encoder, one, other):
    """F1 of a bitext whose sides are in one order."""
    nearest = cosines(encoder, one, other).argmax(axis=1)
    return f1_score(np.arange(len(one)), nearest, average="weighted", zero_division=0)


def test_languages_that_share_passages_are_mined_against_one_another(encoder, tmp_path):
    # The first three share twelve passages; Icelandic shares nine with them, too few.
    own = {"deu": range(12), "fra": range(12), "rus": range(12), "isl": range(3, 21)}
    rows = [(text(code, number), text("eng", number), code) for code, numbers in own.items() for number in numbers]
    # A second German text of the first passage is not another translation.
    rows.append(("zweiter Text", text("eng", 0), "deu"))
    queries, passages, languages = zip(*rows, strict=True)
    path = write(tmp_path / "p.parquet", query=queries, passage=passages, lang=languages, passage_lang=["en"] * 55)
    found = evaluate(encoder, path)
    scores = {(score.task, score.languages): score for score in found.scores}
    codes = {"deu": "deu-Latn", "fra": "fra-Latn", "rus": "rus-Cyrl", "isl": "isl-Latn"}
    for code, numbers in own.items():
        bitext = scores["PBitextMining", (codes[code], "eng-Latn")]
        sides = ([text(kind, number) for number in numbers] for kind in (code, "eng"))
        assert bitext.value == pytest.approx(mined(encoder, *sides)) and bitext.examples == len(numbers)
        assert ("PRetrieval", (codes[code],)) in scores
    pairs = [score.languages for score in found.scores if score.task == "PAnyToAnyBitextMining"]
    order = sorted(set(codes.values()) - {"isl-Latn"}, key=lambda code: text_key(f"any-to-any {code}"))
    assert sorted(pairs) == sorted(pairwise([*order, order[0]]))
    for pair in pairs:
        sides = ([text(code.split("-")[0], number) for number in range(12)] for code in pair)
        assert scores["PAnyToAnyBitextMining", pair].value == pytest.approx(mined(encoder, *sides))


def test_a_bitext_leaves_a_text_one_right_answer():
    rows = PairRows(["a", "a", "b", "c"], ["1", "2", "2", "3"], [[]] * 4, ["deu-Latn"] * 4, [""] * 4)
    # "2" is a passage of "a", too: beside "1" it would be a second answer.
    assert with_passages(rows) == {"deu-Latn": (("deu-Latn",), {"a": "1", "c": "3"})}
    german, french, english = ([f"{code}{row}" for row in range(12)] for code in ("de", "fr", "en"))
    # "de0" has the passage of "fr1", too.
    queries, passages = [*german, "de0", *french], [*english, "en1", *english]
    codes = ["deu-Latn"] * 13 + ["fra-Latn"] * 12
    [(languages, found)] = any_to_any(PairRows(queries, passages, [[]] * 25, codes, ["eng-Latn"] * 25)).values()
    own, other = (german, french) if languages[0] == "deu-Latn" else (french, german)
    assert found == dict(zip(own[0:1] + own[2:], other[0:1] + other[2:], strict=True))


def test_the_published_format(encoder, tmp_path):
    numbers = range(20)
    queries, passages = ([text(kind, number) for number in numbers] for kind in ("query", "passage"))
    negatives = {
        "negative_1": [text("negative", number % 7) for number in numbers],
        "negative_2": [None if number % 3 else passages[number - 1] for number in numbers],
        "negative_10": [None] * 20,
    }
    # Two passages answer the first query, and one query is a passage of another.
    queries[1], passages[2] = queries[0], queries[5]
    # A query that is its own passage finds it.
    queries[3] = passages[3]
    written = [instruct("Find it.", query) if number % 2 else query for number, query in enumerate(queries)]
    path = write(tmp_path / "web_qa.parquet", query=written, passage=passages, domain=["x"] * 20, **negatives)
    documents = list(dict.fromkeys([*passages, *negatives["negative_1"], *filter(None, negatives["negative_2"])]))
    distinct, pairs = list(dict.fromkeys(queries)), set(zip(queries, passages, strict=True))
    relevant = np.array([[(query, document) in pairs for document in documents] for query in distinct])
    expected = cosines(encoder, distinct, documents)
    # A query does not find itself.
    expected[distinct.index(queries[5]), documents.index(queries[5])] = -1.0
    found = evaluate(encoder, path)
    (score,) = found.select(task="WebQaRetrieval")
    assert score.value == pytest.approx(ndcg_score(relevant, expected, k=10), **ROUNDED)
    assert (score.languages, score.examples) == ((), 19) and not summarize(found, "tiny").languages


def test_other_data_of_the_same_name_are_another_revision_and_other_files_refused(tmp_path, refuses):
    revisions = []
    for negative in ("x", "y", "x"):
        path = write(tmp_path / "p.parquet", query=["a", "b"], passage=["c", "d"], negative_1=[negative, "z"])
        revisions.append([task.metadata.revision for task in local_tasks(path)])
    (retrieval, bitext), (other, same), again = revisions
    assert retrieval != other and bitext == same and again == [retrieval, bitext]
    (tmp_path / "notes.txt").write_text("notes")
    for name, part in (("notes.txt", "not a readable parquet"), ("absent", "no such file"), ("", "held_out.parquet")):
        with refuses(tmp_path / name, part):
            local_tasks(tmp_path / name)


def test_a_cldr_build_has_no_task_of_a_single_script(encoder, tmp_path, caplog):
    folder = build_cldr(tmp_path / "build", languages=["da", "ja", "ru", "sw"])
    found = evaluate(encoder, folder)
    assert {score.task.removeprefix("Cldr") for score in found.scores} == {
        *("Retrieval", "BitextMining", "AnyToAnyBitextMining"),
        *("ScriptClassification", "ScriptClustering", "KindClassification", "KindClustering"),
    }
    codes = {"dan-Latn", "jpn-Jpan", "rus-Cyrl", "swa-Latn"}
    assert {score.languages for score in found.select(task="CldrRetrieval")} == {(code,) for code in codes}
    assert {score.languages for score in found.select(task="CldrBitextMining")} == {(c, "eng-Latn") for c in codes}
    candidates = pq.read_table(folder / "candidates.parquet")["passage"].to_pylist()
    rows = [row for row in pq.read_table(folder / "held_out.parquet").to_pylist() if row["lang"] == "swa"]
    relevant = np.array([[row["passage"] == name for name in candidates] for row in rows])
    expected = ndcg_score(relevant, cosines(encoder, [row["query"] for row in rows], candidates), k=10)
    (swahili,) = found.select(task="CldrRetrieval", languages=("swa-Latn",))
    assert swahili.value == pytest.approx(expected, **ROUNDED) and swahili.examples == len(rows)
    names = [task.metadata.name for task in local_tasks(build_cldr(tmp_path / "latin", languages=["da", "sw"]))]
    assert "CldrKindClustering" in names and "CldrScriptClustering" not in names
    assert "column 'script': fewer than two labels" in caplog.text


def test_a_gettext_build(encoder, tmp_path):
    catalogs = write_catalogs(tmp_path / "locale", ["de", "ja", "sr", "sr@latin"])
    built = build_gettext(tmp_path / "gettext", locale_dirs=[str(catalogs)], held_out_per_language=80)
    found = evaluate(encoder, built)
    codes = {"deu-Latn", "jpn-Jpan", "srp-Cyrl", "srp-Latn"}
    assert {score.languages for score in found.select(task="GettextBitextMining")} == {(c, "eng-Latn") for c in codes}
    assert {score.languages for score in found.select(task="GettextRetrieval")} == {(code,) for code in codes}
    ring = found.select(task="GettextAnyToAnyBitextMining")
    assert {code for score in ring for code in score.languages} == codes and len({s.task for s in found.scores}) == 3
    assert all(10 <= score.examples <= 80 for score in ring)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": ["a"], "passage": ["b"], "negative_1": ["b"]}, "column 'negative_1' equals column 'passage'"),
        ({"query": ["a"], "passage": ["b"], "lang": ["English"]}, "row 0: lang 'English' is not a language"),
        ({"query": ["a"], "passage": ["b"], "lang": ["deu"], "script": ["Latin"]}, "script 'Latin' is not a language"),
        ({"query": ["a", "c"], "passage": ["b", "d"], "lang": ["deu", None]}, "row 1: lang None is not a language"),
        ({"query": ["a"], "passage": ["b"], "lang": [7]}, "column 'lang' holds int64, not text"),
        ({"query": ["a"], "passage": ["b"], "passage_lang": ["de"], "passage_script": [""]}, "is not a language"),
    ],
)
def test_a_faulty_file_is_refused(columns, message, tmp_path, refuses):
    path = write(tmp_path / "p.parquet", **columns)
    with refuses(path, message):
        local_tasks(path)


TEXTS = [text(kind, number) for kind in ("river", "東京", "šum") for number in range(12)]
LABELS = [kind for kind in "abc" for _ in range(12)]


def test_labelled_texts_are_scored_as_scikit_learn_does(encoder, tmp_path):
    labels = labels_of("here", TEXTS, LABELS)
    task = classification("Kinds", tmp_path, ["deu-Latn"], labels)
    train, test = (task.dataset[split] for split in ("train", "test"))
    assert set(train["text"]) | set(test["text"]) == set(TEXTS) and len(train) == len(test) == 18
    # With no more than eight texts of a label, mteb trains on all of them in every experiment.
    learnt = LogisticRegression(max_iter=100).fit(encoder.encode(train["text"]), train["label"])
    assert by_mteb(encoder, task)["test"][0]["main_score"] == pytest.approx(
        learnt.score(encoder.encode(test["text"]), test["label"])
    )

    task = clustering("Kinds", tmp_path, ["deu-Latn"], labels)
    embeddings, classes = encoder.encode(task.dataset["test"]["sentences"]), np.array(task.dataset["test"]["labels"])
    draw, scores = random.Random(task.seed), []
    for _ in range(10):
        drawn = draw.choices(range(36), k=task.max_documents_per_cluster)
        kmeans = MiniBatchKMeans(3, batch_size=512, n_init=1, random_state=task.seed)
        scores.append(v_measure_score(classes[drawn], kmeans.fit_predict(embeddings[drawn])))
    assert by_mteb(encoder, task)["test"][0]["main_score"] == pytest.approx(np.mean(scores))


def test_every_label_that_is_asked_for_was_learnt_and_too_few_are_refused(tmp_path, refuses):
    labels = [f"label {number}" for number in range(8) for _ in range(number)]
    texts = [text("text", number) for number in range(len(labels))]
    # A text of two labels belongs to neither.
    labelled = labels_of("here", [*texts, "both", "both"], [*labels, "label 6", "label 7"])
    assert "both" not in labelled.text.tolist()
    task = classification("Kinds", tmp_path, [], labelled)
    train, test = (Counter(task.dataset[split]["label"]) for split in ("train", "test"))
    # Numbers of the labels that have texts, in the order of their names: label 1 is number 0.
    assert train == {number: (number + 2) // 2 for number in range(7)}
    assert test == {number: (number + 1) // 2 for number in range(1, 7)}
    for labels in ("aaaa", "aaab", "abcd"):
        with refuses("here", "fewer than two labels have two texts"):
            labels_of("here", [*"wxyz"], [*labels])


@pytest.fixture
def prepare_source(tmp_path, small_tokenizer, options):
    """Prepares a source with kept texts and returns its folder."""

    def prepare_source(source, **changes):
        changed = replace(options, **{"keep_texts": True, "validation_share": 0.3, "max_length": 8, **changes})
        (prepared,) = prepare([source], small_tokenizer, tmp_path / "prepared", changed)
        return prepared.folder

    return prepare_source


def validation_rows(folder, source):
    """The rows of the files that the prepared source keeps for validation."""
    prepared = PreparedSource(folder)
    kept = {text.split("\nQuery: ")[-1] for text in prepared.texts(prepared.rows["validation"][:, 0])}
    rows = [row for path in source.files for row in pq.read_table(path).to_pylist() if row["query"] in kept]
    assert 3 < len(rows) == len(prepared.rows["validation"])
    return rows


@pytest.mark.parametrize(("symmetric", "prompt"), [(False, None), (True, None), (True, "Look for\nQuery: ")])
def test_validation_rows_of_retrieval(symmetric, prompt, encoder, write_source, prepare_source):
    own = {} if prompt is None else {"instruction": None}
    source = write_source("my_qa", rows=60, negatives=(2, 5), symmetric=symmetric, languages=["ru"], **own)
    folder = prepare_source(source, query_prompt=prompt)
    rows = validation_rows(folder, source)
    documents = sorted({row[name] for row in rows for name in row if name != "query" and row[name] is not None})
    relevant = np.array([[row["passage"] == document for document in documents] for row in rows])
    expected = ndcg_score(relevant, cosines(encoder, [row["query"] for row in rows], documents), k=10)
    (score,) = evaluate(encoder, folder).scores
    assert (score.task, score.languages, score.examples) == ("MyQaValidationRetrieval", ("rus-Cyrl",), len(rows))
    assert score.value == pytest.approx(expected, **ROUNDED)


def test_validation_rows_of_clustering_and_classification(encoder, write_source, prepare_source, tmp_path):
    topics = write_source("topics", rows=40, negatives=6, task_type="clustering", symmetric=True)
    precisions = []
    for row in validation_rows(prepare_source(topics), topics):
        own = [row[name] for name in row if name != "query"]
        right = np.arange(len(own))[None] == 0
        precisions.append(label_ranking_average_precision_score(right, cosines(encoder, [row["query"]], own)))
    names = ["negative", "positive"]
    path = write(
        tmp_path / "polarity.parquet",
        query=[text("good" if number % 2 else "bad", number) for number in range(60)],
        passage=names * 30,
        negative_1=names[::-1] * 30,
    )
    polarity = Source("polarity", [path], "classification", "Tell it.", languages=["deu", "fra"])
    labels = {row["query"]: row["passage"] for row in validation_rows(prepare_source(polarity), polarity)}
    # Both lie in one folder, beside a source of which no row was drawn.
    folder = prepare_source(write_source("none", rows=10), validation_share=0.0).parent
    found = {score.task: score for score in evaluate(encoder, folder).scores}
    assert set(found) == {"PolarityValidationClassification", "TopicsValidationReranking"}
    assert found["TopicsValidationReranking"].value == pytest.approx(np.mean(precisions), **ROUNDED)
    assert found["PolarityValidationClassification"].languages == ()
    halves = local_tasks(folder)[0].dataset.values()
    known = [(each, label) for half in halves for each, label in zip(half["text"], half["label"], strict=True)]
    assert {each: names[label] for each, label in known} == labels


def test_all_positives_of_a_validation_row_are_right(tmp_path, prepare_source):
    rows = range(20)
    path = write(
        tmp_path / "several.parquet",
        query=[text("question", row) for row in rows],
        passage=[text("answer", row) for row in rows],
        positive_2=[text("second", row) if row % 2 else None for row in rows],
    )
    (task,) = local_tasks(prepare_source(Source("several", [path], "retrieval", "Find."), validation_share=0.5))
    split = task.dataset["default"]["test"]
    texts = dict(zip(split["corpus"]["id"], split["corpus"]["text"], strict=True))
    queries = dict(zip(split["queries"]["id"], split["queries"]["text"], strict=True))
    right = {queries[query].split()[-1]: {texts[each] for each in own} for query, own in split["relevant_docs"].items()}
    assert len(right) == 10
    for row, own in right.items():
        also = {text("second", int(row))} if int(row) % 2 else set()
        assert own == {text("answer", int(row)), *also}
    pairs = local_tasks(path)[0].dataset["default"]["test"]
    assert sorted(map(len, pairs["relevant_docs"].values())) == [1] * 10 + [2] * 10


def test_validation_rows_of_similarity(tmp_path, encoder, prepare_source):
    rows = range(40)
    columns = {"query": [text("one", row) for row in rows], "passage": [text("other", 7 * row) for row in rows]}
    path = write(tmp_path / "graded.parquet", **columns, score=[row * 7 % 10 / 4 for row in rows])
    source = Source("graded", [path], "similarity", "Compare.", symmetric=True)
    folder = prepare_source(source)
    kept = validation_rows(folder, source)
    similar = [cosines(encoder, [row["query"]], [row["passage"]])[0, 0] for row in kept]
    (score,) = evaluate(encoder, folder).scores
    assert (score.task, score.examples) == ("GradedValidationSTS", len(kept))
    assert score.value == pytest.approx(spearmanr(similar, [row["score"] for row in kept])[0], **ROUNDED)


def test_sources_without_texts_or_rows_are_refused(write_source, prepare_source, refuses):
    folder = prepare_source(write_source("plain", rows=30), keep_texts=False)
    for path in (folder, folder.parent):
        with refuses(folder, "the texts were not kept", "prepare it again by prepare.py --keep-texts"):
            local_tasks(path)
    folder = prepare_source(write_source("short", rows=30), validation_share=0.0)
    with refuses(folder, "no validation rows", "validation_share"):
        local_tasks(folder)
    source = write_source("alone", rows=30, negatives=0, task_type="clustering")
    with refuses("no validation row has a negative"):
        local_tasks(prepare_source(source, num_hard_negatives=(("clustering", 0),)))
    (folder / "tokens.int32").unlink()
    with refuses(folder, "not a whole prepared source"):
        local_tasks(folder)
