"""mteb's task classes over data in memory: scores are those of mteb alone, and the means of their examples."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.evaluation.local_runs import write
from training.evaluation import models
from training.evaluation.encoding import EmbeddingStore
from training.evaluation.local_tasks import classification as classification_task
from training.evaluation.local_tasks import labels_of, pair_tasks
from training.evaluation.models import EncoderView, EvaluatedModel, Prompts
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.runner import (
    agree,
    evaluate_model,
    has_examples,
    recorded,
)

TEXTS = [f"{word} {number} {other}" for number in range(5) for word in "ab" for other in ("rain", "sun", "wind")]
HALF = len(TEXTS) // 2


def make(kind, task_type, metric, data, languages=("eng-Latn",)):
    name = f"Memory{task_type}"
    metadata = TaskMetadata(
        name=name,
        description="In memory.",
        dataset={"path": "memory", "revision": "1"},
        type=task_type,
        category="t2t",
        eval_splits=["test"],
        eval_langs=languages if isinstance(languages, dict) else list(languages),
        main_score=metric,
    )
    task = type(name, (kind,), {"metadata": metadata, "load_data": lambda self, **_: None})()
    task.dataset, task.data_loaded = data, True
    return task


def split(**columns):
    return DatasetDict({"test": Dataset.from_dict(columns)})


def sts():
    data = split(sentence1=TEXTS[:HALF], sentence2=TEXTS[HALF:], score=np.linspace(0, 5, HALF).tolist())
    return make(AbsTaskSTS, "STS", "cosine_spearman", data)


def pair_classification():
    data = split(sentence1=TEXTS[:HALF], sentence2=TEXTS[HALF:], labels=[n % 2 for n in range(HALF)])
    return make(AbsTaskPairClassification, "PairClassification", "max_ap", data)


def clustering():
    data = split(sentences=TEXTS, labels=[n % 3 for n in range(len(TEXTS))])
    task = make(AbsTaskClustering, "Clustering", "v_measure", data)
    task.max_fraction_of_documents_to_embed, task.max_documents_to_embed, task.max_documents_per_cluster = None, 20, 10
    return task


def multilabel():
    labels = [[n % 2, 2 + n % 3] for n in range(len(TEXTS))]
    data = DatasetDict({name: Dataset.from_dict({"text": TEXTS, "label": labels}) for name in ("train", "test")})
    return make(AbsTaskMultilabelClassification, "MultilabelClassification", "accuracy", data)


def classification():
    labels = [n // 3 % 2 for n in range(len(TEXTS))]
    of_language = {name: Dataset.from_dict({"text": TEXTS, "label": labels}) for name in ("train", "test")}
    data = {language: DatasetDict(of_language) for language in ("en", "de")}
    return make(AbsTaskClassification, "Classification", "accuracy", data, {"en": ["eng-Latn"], "de": ["deu-Latn"]})


def parallel_bitext():
    data = split(eng=TEXTS[:HALF], deu=TEXTS[HALF:], fra=TEXTS[:HALF][::-1])
    languages = {"eng-deu": ["eng-Latn", "deu-Latn"], "eng-fra": ["eng-Latn", "fra-Latn"]}
    task = make(AbsTaskBitextMining, "BitextMining", "f1", data, languages)
    task.parallel_subsets = True
    return task


def retrieval():
    corpus = [{"id": f"d{n}", "title": text[:1], "text": text} for n, text in enumerate(TEXTS)]
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(TEXTS[::4])]
    relevant = {f"q{n}": {f"d{(5 * n) % len(TEXTS)}": 2, f"d{n}": 1} for n in range(len(queries))}
    data = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries), "relevant_docs": relevant}
    return make(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", {"default": {"test": {**data, "top_ranked": None}}})


KINDS = [sts, pair_classification, clustering, multilabel, classification, parallel_bitext, retrieval]


@pytest.fixture
def encoder(tiny_model, tiny_tokenizer):
    return build_sentence_transformer(tiny_model, tiny_tokenizer, prompts={"query": "", "document": ""})


def evaluated(encoder):
    meta = ModelMeta.create_empty({"name": "a/b", "revision": "1"})
    return EvaluatedModel(ModelRecord("model", identity="1"), EmbeddingStore(encoder), meta, Prompts())


@pytest.fixture
def evaluate(encoder, tmp_path):
    def run(*tasks, output=None, into=None, **options):
        found = Evaluation() if into is None else into
        evaluate_model(
            evaluated(encoder), tasks, found, output or tmp_path / str(len(list(tmp_path.iterdir()))), **options
        )
        return found

    return run


def values(evaluation, **fields):
    assert not evaluation.failures
    return {score.subset: score.value for score in evaluation.select(**fields)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_mteb_alone_whatever_was_evaluated_before(kind, evaluate, encoder, capsys):
    (result,) = mteb.evaluate(
        SentenceTransformerEncoderWrapper(encoder), kind(), cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results
    expected = {each["hf_subset"]: pytest.approx(each["main_score"], abs=2e-5) for each in result.scores["test"]}
    capsys.readouterr()
    assert values(evaluate(kind())) == expected
    # The bar over tasks is shown, and no bar of mteb or datasets.
    shown = capsys.readouterr().err
    assert "model: 100%" in shown and shown.count("%|") == shown.count("model: ")
    # Narrower views first, and the same task again.
    task, other = kind(), retrieval() if kind is not retrieval else sts()
    first = evaluate(other, task, dims=[8, 32], precisions=["int8", "float32"])
    assert values(first, task=task.metadata.name, dimension=32, precision="float32") == expected
    assert values(evaluate(task), task=task.metadata.name) == expected


@pytest.mark.parametrize("kind", [sts, classification, parallel_bitext, retrieval])
def test_int8_does_not_depend_on_what_else_is_evaluated(kind, evaluate):
    other = retrieval if kind is not retrieval else sts
    beside = evaluate(other(), kind(), precisions=["float32", "binary", "int8"])
    found = values(beside, task=kind().metadata.name, precision="int8")
    assert found == values(evaluate(kind(), precisions=["int8"]), precision="int8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_evaluation_is_the_same_and_encodes_nothing(kind, evaluate, tmp_path, monkeypatch):
    found = evaluate(kind(), output=tmp_path / "out")
    before = {score.key: score for score in found.scores}
    monkeypatch.setattr(EmbeddingStore, "encode", None)
    again = evaluate(kind(), output=tmp_path / "out", into=found)
    assert {score.key: score for score in again.scores} == before and not again.failures
    assert all(score.examples > 0 for score in again.scores)


def test_a_view_that_fails_is_named_and_the_others_stay(evaluate, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no bits")

    monkeypatch.setattr(models, "quantized", fails)
    found = evaluate(sts(), dims=[32, 8], precisions=["int8", "float32"])
    assert {(score.dimension, score.precision) for score in found.scores} == {(32, "float32"), (8, "float32")}
    assert found.failures == {f"model: MemorySTS, {dim} dimensions, int8": "RuntimeError: no bits" for dim in (32, 8)}


@pytest.mark.parametrize(
    ("number", "metrics"),
    [
        (0, ["ndcg_at_10", "map_at_10", "recall_at_5", "precision_at_5", "hit_rate_at_1", "mrr_at_10"]),
        (1, ["f1", "accuracy"]),
        (2, ["accuracy"]),
    ],
    ids=["retrieval", "bitext", "classification"],
)
def test_examples_average_to_every_metric(number, metrics, tiny_model, tiny_tokenizer, tmp_path, sentences):
    # Few dimensions: some of the answers are wrong.
    view = EncoderView(evaluated(build_sentence_transformer(tiny_model, tiny_tokenizer)), 2)
    queries = [*sentences, *(f"{text} {text}" for text in sentences)]
    path = write(tmp_path / "pairs.parquet", query=queries, passage=[text[::-1] for text in queries])
    texts = {f"{text} {number}": "ab"[number % 2] for number in range(4) for text in sentences}
    labels = labels_of("here", list(texts), list(texts.values()))
    task = [*pair_tasks(path, "Names"), classification_task("Names", tmp_path, ["eng-Latn"], labels)][number]
    for metric in metrics:
        task.metadata = task.metadata.model_copy(update={"main_score": metric})
        with recorded(task) as found:
            options = {"co2_tracker": False, "show_progress_bar": False, "prediction_folder": tmp_path / "unused"}
            (result,) = mteb.evaluate(view, task, cache=None, **options).task_results
        examples = found["test", "default"]
        assert len(examples) == 20 and 0 < examples.mean() < 1 and not (tmp_path / "unused").exists()
        assert examples.mean() == pytest.approx(result.scores["test"][0][metric], abs=2e-5)


def test_metrics_that_are_not_a_mean_have_no_examples():
    names = ["STS22.v2", "TwentyNewsgroupsClustering.v2", "SprintDuplicateQuestions", "NFCorpus"]
    assert [has_examples(task) for task in map(mteb.get_task, names)] == [False, False, False, True]
    hits = np.array([0, 1], np.float32)
    assert agree(hits, 0.5) and not agree(hits, 0.6) and not agree(hits[:0], 0.0)
