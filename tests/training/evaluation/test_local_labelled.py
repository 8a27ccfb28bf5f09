"""Labelled texts and validation rows as mteb's tasks: split by draw, scored as scikit-learn does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, v_measure_score
from transformers import PreTrainedTokenizerBase

pytest.importorskip("mteb")

import mteb
from sentence_transformers import SentenceTransformer

from tests.training.evaluation.local_runs import cosines, evaluate, text, without_prompts, write
from training.data.manifest import Source
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource
from training.evaluation.local.labelled import classification, clustering, labels_of
from training.evaluation.local_tasks import local_tasks

Refuses = Callable[..., AbstractContextManager[None]]
Prepare = Callable[..., PreparedSource]


@pytest.fixture
def model(tiny_model, tiny_tokenizer) -> SentenceTransformer:
    return without_prompts(tiny_model, tiny_tokenizer)


def run(model: SentenceTransformer, task: object) -> float:
    (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    return result.scores["test"][0]["main_score"]


TEXTS = [text(kind, number) for kind in ("river", "東京", "šum") for number in range(12)]
LABELS = [kind for kind in "abc" for _ in range(12)]


def test_labelled_texts_are_scored_as_scikit_learn_does(model: SentenceTransformer, tmp_path: Path) -> None:
    labels = labels_of("here", TEXTS, LABELS)
    task = classification("Kinds", tmp_path, ["deu-Latn"], labels)
    train, test = (task.dataset[split] for split in ("train", "test"))
    assert set(train["text"]) | set(test["text"]) == set(TEXTS) and len(train) == len(test) == 18
    # With no more than eight texts of a label, mteb trains on all of them in every experiment.
    learnt = LogisticRegression(max_iter=100).fit(model.encode(train["text"]), train["label"])
    assert run(model, task) == pytest.approx(learnt.score(model.encode(test["text"]), test["label"]))

    task = clustering("Kinds", tmp_path, ["deu-Latn"], labels)
    embeddings, classes = model.encode(task.dataset["test"]["sentences"]), np.array(task.dataset["test"]["labels"])
    draw, scores = random.Random(task.seed), []
    for _ in range(10):
        drawn = draw.choices(range(36), k=task.max_documents_per_cluster)
        kmeans = MiniBatchKMeans(3, batch_size=512, n_init=1, random_state=task.seed)
        scores.append(v_measure_score(classes[drawn], kmeans.fit_predict(embeddings[drawn])))
    assert run(model, task) == pytest.approx(np.mean(scores))


def test_the_order_of_rows_has_no_influence(tmp_path: Path) -> None:
    rows = list(zip(TEXTS, LABELS, strict=True))
    tasks = []
    for seed in (0, 1):
        random.Random(seed).shuffle(rows)
        texts, labels = zip(*rows, *rows[:5], strict=True)
        tasks.append(classification("Kinds", tmp_path, [], labels_of("here", texts, labels)))
    assert tasks[0].metadata.revision == tasks[1].metadata.revision
    assert tasks[0].dataset["test"].to_dict() == tasks[1].dataset["test"].to_dict()


def test_every_label_that_is_asked_for_was_learnt(tmp_path: Path) -> None:
    labels = [f"label {number}" for number in range(8) for _ in range(number)]
    texts = [text("text", number) for number in range(len(labels))]
    # A text of two labels belongs to neither.
    labelled = labels_of("here", [*texts, "both", "both"], [*labels, "label 6", "label 7"])
    assert "both" not in labelled
    task = classification("Kinds", tmp_path, [], labelled)
    train, test = (Counter(task.dataset[split]["label"]) for split in ("train", "test"))
    # Numbers of the labels that have texts, in the order of their names: label 1 is number 0.
    assert train == {number: (number + 2) // 2 for number in range(7)}
    assert test == {number: (number + 1) // 2 for number in range(1, 7)}


@pytest.mark.parametrize("labels", [["a"] * 4, ["a", "a", "a", "b"], ["a", "b", "c", "d"]])
def test_too_few_labels_are_refused(labels: list[str], refuses: Refuses) -> None:
    with refuses("here", "fewer than two labels have two texts"):
        labels_of("here", ["w", "x", "y", "z"], labels)


@pytest.fixture
def prepare_source(
    tmp_path: Path, small_tokenizer: PreTrainedTokenizerBase, options: PreparationOptions
) -> Callable[..., Path]:
    """Prepares a source with kept texts and returns its folder."""

    def prepare_source(source: Source, **changes: object) -> Path:
        changed = replace(options, **{"keep_texts": True, "validation_share": 0.3, "max_length": 8, **changes})
        (prepared,) = prepare([source], small_tokenizer, tmp_path / "prepared", changed)
        return prepared.folder

    return prepare_source


def validation_rows(folder: Path, source: Source) -> list[dict[str, str]]:
    """The rows of the files that the prepared source keeps for validation."""
    prepared = PreparedSource(folder)
    kept = {text.split("\nQuery: ")[-1] for text in prepared.texts(prepared.rows["validation"][:, 0])}
    rows = [row for path in source.files for row in pq.read_table(path).to_pylist() if row["query"] in kept]
    assert 3 < len(rows) == len(prepared.rows["validation"])
    return rows


@pytest.mark.parametrize("symmetric", [False, True])
def test_validation_rows_of_retrieval(
    symmetric: bool, model: SentenceTransformer, write_source: Callable[..., Source], prepare_source: Callable
) -> None:
    source = write_source("my_qa", rows=60, negatives=(2, 5), symmetric=symmetric, languages=["ru"])
    folder = prepare_source(source)
    rows = validation_rows(folder, source)
    documents = sorted({row[name] for row in rows for name in row if name != "query" and row[name] is not None})
    relevant = np.array([[row["passage"] == document for document in documents] for row in rows])
    expected = ndcg_score(relevant, cosines(model, [row["query"] for row in rows], documents), k=10)
    (score,) = evaluate(model, folder).scores
    assert (score.task, score.languages, score.examples) == ("MyQaValidationRetrieval", ("rus-Cyrl",), len(rows))
    assert score.value == pytest.approx(expected, abs=1e-5)


def test_validation_rows_of_clustering_and_classification(
    model: SentenceTransformer, write_source: Callable[..., Source], prepare_source: Callable, tmp_path: Path
) -> None:
    topics = write_source("topics", rows=40, negatives=6, task_type="clustering", symmetric=True)
    rows = validation_rows(prepare_source(topics), topics)
    precisions = []
    for row in rows:
        own = [row[name] for name in row if name != "query"]
        right = np.arange(len(own))[None] == 0
        precisions.append(label_ranking_average_precision_score(right, cosines(model, [row["query"]], own)))
    path = write(
        tmp_path / "polarity.parquet",
        query=[text("good" if number % 2 else "bad", number) for number in range(60)],
        passage=["positive" if number % 2 else "negative" for number in range(60)],
        negative_1=["negative" if number % 2 else "positive" for number in range(60)],
    )
    polarity = Source("polarity", [path], "classification", "Tell it.", languages=["deu", "fra"])
    labels = {row["query"]: row["passage"] for row in validation_rows(prepare_source(polarity), polarity)}
    # Both lie in one folder, beside a source of which no row was drawn.
    folder = prepare_source(write_source("none", rows=10), validation_share=0.0).parent
    found = {score.task: score for score in evaluate(model, folder).scores}
    assert set(found) == {"PolarityValidationClassification", "TopicsValidationReranking"}
    assert found["TopicsValidationReranking"].value == pytest.approx(np.mean(precisions), abs=1e-5)
    assert found["PolarityValidationClassification"].languages == ()
    halves = local_tasks(folder)[0].dataset
    told = [(text, label) for half in halves.values() for text, label in zip(half["text"], half["label"], strict=True)]
    assert {text: ("negative", "positive")[label] for text, label in told} == labels


def test_a_source_that_was_prepared_twice_is_to_be_named(
    write_source: Callable[..., Source], prepare_source: Callable, refuses: Refuses
) -> None:
    source = write_source("qa", rows=60)
    first, second = prepare_source(source), prepare_source(source, max_length=9)
    with refuses(first.name, second.name, "one source, prepared with different settings", "by name"):
        local_tasks(first.parent)
    assert local_tasks(first) and local_tasks(second)


def test_sources_without_texts_or_rows_are_refused(
    write_source: Callable[..., Source], prepare_source: Callable, refuses: Refuses
) -> None:
    folder = prepare_source(write_source("plain", rows=30), keep_texts=False)
    with refuses(folder, "the texts were not kept", "prepare it again by prepare.py --keep-texts"):
        local_tasks(folder)
    with refuses(folder, "--keep-texts"):
        local_tasks(folder.parent)
    folder = prepare_source(write_source("short", rows=30), validation_share=0.0)
    with refuses(folder, "no validation rows", "validation_share"):
        local_tasks(folder)
    source = write_source("alone", rows=30, negatives=0, task_type="clustering")
    with refuses("no validation row has a negative"):
        local_tasks(prepare_source(source, num_hard_negatives=(("clustering", 0),)))
    (folder / "tokens.int32").unlink()
    with refuses(folder, "not a whole prepared source"):
        local_tasks(folder)
