"""Real mteb task classes over data in memory: scores are those of mteb alone, whatever was evaluated before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from training.evaluation.models import EvaluatedModel, Prompts
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.scoring import evaluate_model
from training.evaluation.store import EmbeddingStore

TEXTS = [f"{word} {number} {other}" for number in range(5) for word in "ab" for other in ("rain", "sun", "wind")]
HALF = len(TEXTS) // 2


def make(kind: type, task_type: str, metric: str, data: Any, languages: Any = ("eng-Latn",)) -> Any:
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


def split(**columns: Any) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_dict(columns)})


def sts() -> Any:
    scores = np.linspace(0, 5, HALF).tolist()
    data = split(sentence1=TEXTS[:HALF], sentence2=TEXTS[HALF:], score=scores)
    return make(AbsTaskSTS, "STS", "cosine_spearman", data)


def pair_classification() -> Any:
    data = {"sentence1": [TEXTS[:HALF]], "sentence2": [TEXTS[HALF:]], "labels": [[n % 2 for n in range(HALF)]]}
    flat = split(**{name: values[0] for name, values in data.items()})
    return make(AbsTaskPairClassification, "PairClassification", "max_ap", flat)


def clustering() -> Any:
    task = make(
        AbsTaskClustering, "Clustering", "v_measure", split(sentences=TEXTS, labels=[n % 3 for n in range(len(TEXTS))])
    )
    task.max_fraction_of_documents_to_embed, task.max_documents_to_embed, task.max_documents_per_cluster = None, 20, 10
    return task


def multilabel() -> Any:
    labels = [[n % 2, 2 + n % 3] for n in range(len(TEXTS))]
    data = DatasetDict({name: Dataset.from_dict({"text": TEXTS, "label": labels}) for name in ("train", "test")})
    return make(AbsTaskMultilabelClassification, "MultilabelClassification", "accuracy", data)


def classification() -> Any:
    of_language = {
        name: Dataset.from_dict({"text": TEXTS, "label": [n // 3 % 2 for n in range(len(TEXTS))]})
        for name in ("train", "test")
    }
    data = {language: DatasetDict(of_language) for language in ("en", "de")}
    return make(AbsTaskClassification, "Classification", "accuracy", data, {"en": ["eng-Latn"], "de": ["deu-Latn"]})


def parallel_bitext() -> Any:
    data = split(eng=TEXTS[:HALF], deu=TEXTS[HALF:], fra=TEXTS[:HALF][::-1])
    languages = {"eng-deu": ["eng-Latn", "deu-Latn"], "eng-fra": ["eng-Latn", "fra-Latn"]}
    task = make(AbsTaskBitextMining, "BitextMining", "f1", data, languages)
    task.parallel_subsets = True
    return task


def retrieval() -> Any:
    corpus = [{"id": f"d{n}", "title": text[:1], "text": text} for n, text in enumerate(TEXTS)]
    queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(TEXTS[::4])]
    relevant = {f"q{n}": {f"d{(5 * n) % len(TEXTS)}": 2, f"d{n}": 1} for n in range(len(queries))}
    of_split = {
        "corpus": Dataset.from_list(corpus),
        "queries": Dataset.from_list(queries),
        "relevant_docs": relevant,
        "top_ranked": None,
    }
    return make(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", {"default": {"test": of_split}})


KINDS = [sts, pair_classification, clustering, multilabel, classification, parallel_bitext, retrieval]


@pytest.fixture
def encoder(tiny_model, tiny_tokenizer):
    return build_sentence_transformer(tiny_model, tiny_tokenizer, prompts={"query": "", "document": ""})


@pytest.fixture
def evaluate(encoder, tmp_path) -> Callable[..., Evaluation]:
    def run(*tasks: Any, output: Path | None = None, into: Evaluation | None = None, **options: Any) -> Evaluation:
        found = Evaluation() if into is None else into
        meta = ModelMeta.create_empty({"name": "a/b", "revision": "1"})
        model = EvaluatedModel(ModelRecord("model", identity="1"), EmbeddingStore(encoder), meta, Prompts())
        evaluate_model(model, tasks, found, output or tmp_path / str(len(list(tmp_path.iterdir()))), **options)
        assert not found.failures
        return found

    return run


def values(evaluation: Evaluation, **fields: Any) -> dict[str, float]:
    return {score.subset: score.value for score in evaluation.select(**fields)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_mteb_alone_whatever_was_evaluated_before(kind, evaluate, encoder):
    (result,) = mteb.evaluate(
        SentenceTransformerEncoderWrapper(encoder), kind(), cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results
    expected = {each["hf_subset"]: pytest.approx(each["main_score"], abs=2e-5) for each in result.scores["test"]}
    assert values(evaluate(kind())) == expected
    task = kind()
    # Narrower views first, and the same task again.
    first = evaluate(
        retrieval() if kind is not retrieval else sts(), task, dims=[8, 32], precisions=["int8", "float32"]
    )
    options = {"task": task.metadata.name, "dimension": 32, "precision": "float32"}
    assert values(first, **options) == expected
    assert values(evaluate(task), task=task.metadata.name) == expected


@pytest.mark.parametrize("kind", [sts, classification, parallel_bitext, retrieval])
def test_int8_does_not_depend_on_what_else_is_evaluated(kind, evaluate):
    name = kind().metadata.name
    alone = values(evaluate(kind(), precisions=["int8"]), precision="int8")
    other = retrieval if kind is not retrieval else sts
    beside = evaluate(other(), kind(), precisions=["float32", "binary", "int8"])
    assert values(beside, task=name, precision="int8") == alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_evaluation_is_the_same_and_encodes_nothing(kind, evaluate, tmp_path, monkeypatch):
    output = tmp_path / "out"
    found = evaluate(kind(), output=output)
    before = {score.key: score for score in found.scores}
    monkeypatch.setattr(EmbeddingStore, "encode", None)
    again = evaluate(kind(), output=output, into=found)
    assert {score.key: score for score in again.scores} == before
    assert all(score.examples > 0 for score in again.scores)


def test_a_view_that_fails_is_named_and_the_others_stay(encoder, tmp_path, monkeypatch):
    from training.evaluation import encoding

    def fails(*arguments: Any) -> None:
        raise RuntimeError("no bits")

    monkeypatch.setattr(encoding, "quantized", fails)
    found = Evaluation()
    meta = ModelMeta.create_empty({"name": "a/b", "revision": "1"})
    model = EvaluatedModel(ModelRecord("model"), EmbeddingStore(encoder), meta, Prompts())
    evaluate_model(model, [sts()], found, tmp_path, dims=[32, 8], precisions=["int8", "float32"])
    assert {(score.dimension, score.precision) for score in found.scores} == {(32, "float32"), (8, "float32")}
    assert found.failures == {f"model: MemorySTS, {dim} dimensions, int8": "RuntimeError: no bits" for dim in (32, 8)}
