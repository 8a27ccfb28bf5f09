"""What single examples score: their mean is mteb's score, whatever the metric."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("mteb")

import mteb
from mteb.models import ModelMeta

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation.encoding import EncoderView
from training.evaluation.examples import agree, has_examples, recorded
from training.evaluation.local.labelled import classification
from training.evaluation.local.pair_tasks import pair_tasks
from training.evaluation.store import EmbeddingStore


@pytest.fixture
def view(tiny_model, tiny_tokenizer) -> EncoderView:
    store = EmbeddingStore(build_sentence_transformer(tiny_model, tiny_tokenizer))
    # Few dimensions: some of the answers are wrong.
    return EncoderView(store, ModelMeta.create_empty({"name": "a/b"}), 2)


@pytest.fixture
def pairs(tmp_path, sentences):
    path = tmp_path / "pairs.parquet"
    queries = [*sentences, *(f"{text} {text}" for text in sentences)]
    pq.write_table(pa.table({"query": queries, "passage": [text[::-1] for text in queries]}), path)
    return path


def evaluated(view, task, folder):
    with recorded(task) as found:
        results = mteb.evaluate(
            view, task, cache=None, co2_tracker=False, show_progress_bar=False, prediction_folder=folder / "unused"
        )
    assert not (folder / "unused").exists()
    return found["test", "default"], results.task_results[0].scores["test"][0]


@pytest.mark.parametrize(
    "metric", ["ndcg_at_10", "map_at_10", "recall_at_5", "precision_at_5", "hit_rate_at_1", "mrr_at_10"]
)
def test_queries_average_to_every_metric_of_retrieval(metric, view, pairs, tmp_path):
    task = pair_tasks(pairs, "Names")[0]
    task.metadata = task.metadata.model_copy(update={"main_score": metric})
    examples, scores = evaluated(view, task, tmp_path)
    assert len(examples) == 20 and 0 < examples.mean() < 1
    assert examples.mean() == pytest.approx(scores[metric], abs=2e-5)


@pytest.mark.parametrize("metric", ["f1", "accuracy"])
def test_pairs_average_to_the_metrics_of_bitext_mining(metric, view, pairs, tmp_path):
    task = pair_tasks(pairs, "Names")[1]
    task.metadata = task.metadata.model_copy(update={"main_score": metric})
    examples, scores = evaluated(view, task, tmp_path)
    assert len(examples) == 20 and 0 < examples.mean() < 1
    assert examples.mean() == pytest.approx(scores[metric], abs=1e-6)


def test_texts_average_to_the_accuracy_of_classification(view, tmp_path, sentences):
    labels = {f"{text} {number}": "ab"[number % 2] for number in range(4) for text in sentences}
    task = classification("Names", tmp_path, ["eng-Latn"], labels)
    examples, scores = evaluated(view, task, tmp_path)
    assert len(examples) == len(task.dataset["test"]) and 0 < examples.mean() < 1
    assert examples.mean() == pytest.approx(scores["accuracy"], abs=1e-6)


def test_metrics_that_are_no_mean_have_no_examples():
    names = ["STS22.v2", "TwentyNewsgroupsClustering.v2", "SprintDuplicateQuestions", "NFCorpus"]
    assert [has_examples(task) for task in map(mteb.get_task, names)] == [False, False, False, True]


def test_examples_of_another_metric_do_not_agree():
    import numpy as np

    assert agree(np.array([0, 1], np.float32), 0.5)
    assert not agree(np.array([0, 1], np.float32), 0.6)
    assert not agree(np.empty(0, np.float32), 0.0)
