"""Views of one model for mteb: their prompts, their int8 scale, and that they find what mteb's own wrapper finds."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.types import PromptType

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.evaluation.local_runs import write
from training.evaluation import models
from training.evaluation.encoding import EmbeddingStore, calibrate, quantized, unit_length
from training.evaluation.local_tasks import pair_tasks
from training.evaluation.models import EncoderView, EvaluatedModel, Prompts
from training.evaluation.records import ModelRecord

TEMPLATE = "Instruct: {instruction}\nQuery: "
QUERY, DOCUMENT = PromptType.query, PromptType.document


@pytest.fixture
def store(tiny_model, tiny_tokenizer):
    return EmbeddingStore(build_sentence_transformer(tiny_model, tiny_tokenizer))


@pytest.fixture
def view(store):
    def make(prompts=None, dimension=32, precision="float32"):
        meta = ModelMeta.create_empty({"name": "a/b"})
        return EncoderView(EvaluatedModel(ModelRecord("a/b"), store, meta, prompts or Prompts()), dimension, precision)

    return make


@pytest.fixture
def local(tmp_path, sentences):
    return pair_tasks(write(tmp_path / "pairs.parquet", query=sentences, passage=sentences), "Names")


BANKING, STS, BUCC = "Banking77Classification", "STS22.v2", "BUCC.v2"
OWN = {"query": "own: ", "document": ""}
PLAIN = Prompts({"query": "query: ", "document": "passage: ", "STS": "same: "})
SORT = Prompts(OWN, {BANKING: "Sort."}, TEMPLATE, default="own: ")


@pytest.mark.parametrize(
    ("prompts", "task", "prompt_type", "expected"),
    [
        # An instruction for the task goes before the model's own prompt.
        (SORT, BANKING, None, "Instruct: Sort.\nQuery: "),
        (SORT, BANKING, DOCUMENT, ""),
        (SORT, STS, None, "own: "),
        (SORT, STS, QUERY, "own: "),
        # Plain prompts are given as mteb gives them.
        (PLAIN, BANKING, QUERY, "query: "),
        (PLAIN, BANKING, DOCUMENT, "passage: "),
        (PLAIN, BANKING, None, ""),
        (PLAIN, STS, None, "same: "),
        (None, BANKING, QUERY, ""),
        (Prompts({"p": "first: "}, default="first: "), BANKING, None, "first: "),
    ],
)
def test_prompts(view, prompts, task, prompt_type, expected):
    assert view(prompts).prompt(mteb.get_task(task).metadata, prompt_type) == expected


def test_without_own_prompts_every_task_gets_an_instruction(view):
    banking = mteb.get_task(BANKING).metadata
    found = view(Prompts(by_task={}, template=TEMPLATE)).prompt(banking, None)
    assert found.startswith("Instruct: ") and found.endswith("\nQuery: ") and len(found) > len(TEMPLATE) - 10
    everywhere = Prompts(by_task={}, template=TEMPLATE, on_documents=True)
    assert view(everywhere).prompt(banking, DOCUMENT) == found


def test_tasks_of_mteb_get_the_instruction_for_their_type_and_local_ones_the_models_own(view, local):
    instructions = MODEL_REGISTRY["codefuse-ai/F2LLM-v2-80M"].loader_kwargs["prompts_dict"]
    used = view(Prompts(OWN, instructions, TEMPLATE, default="own: "))
    assert BUCC not in instructions
    assert used.prompt(mteb.get_task(BUCC).metadata, None) == f"Instruct: {instructions['BitextMining']}\nQuery: "
    assert {used.prompt(task.metadata, QUERY) for task in local} == {"own: "}


def test_training_and_test_texts_share_the_scale_of_int8(view, sentences):
    halves = [{"text": sentences[:5]}], [{"text": sentences[5:]}]
    options = {"task_metadata": mteb.get_task(BANKING).metadata, "hf_subset": "default"}
    whole, stored = view(), view(precision="int8")
    exact = [unit_length(whole.encode(each, hf_split="test", **options)) for each in halves]
    for half, split, embeddings in zip(halves, ("train", "test"), exact, strict=True):
        expected = quantized(embeddings, "int8", calibrate(exact[0]))
        np.testing.assert_array_equal(stored.encode(half, hf_split=split, **options), expected)


def test_queries_stay_in_float32_beside_int8_which_has_its_own_results_in_mtebs_cache(view, sentences):
    bucc, stored, whole = mteb.get_task(BUCC).metadata, view(precision="int8"), view()
    for prompt_type in (QUERY, DOCUMENT):
        embeddings = [unit_length(each.embed(sentences, bucc, prompt_type)) for each in (stored, whole)]
        assert np.allclose(*embeddings, atol=1e-6) == (prompt_type == QUERY)
    name = stored.mteb_model_meta.experiment_name
    assert "int8" in name and "QT_8bit" in name


@pytest.mark.parametrize(("dimension", "message"), [(33, "choose from 1 to 32"), (0, "dimension 0")])
def test_a_dimension_that_the_model_lacks_is_refused(view, dimension, message, refuses):
    with refuses(message):
        view(dimension=dimension)


@pytest.fixture
def data(sentences):
    corpus = [{"id": f"d{n}", "title": text[:5], "text": text} for n, text in enumerate(sentences)]
    queries = [{"id": f"q{n}", "text": text[::-1]} for n, text in enumerate(sentences[:4])]
    return Dataset.from_list(corpus), Dataset.from_list(queries)


@pytest.fixture
def search(local):
    def found(searcher, data, **options):
        shared = {"task_metadata": local[0].metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
        searcher.index(data[0], num_proc=None, **shared)
        return searcher.search(data[1], num_proc=None, **{"top_k": 3, **options}, **shared)

    return found


@pytest.mark.parametrize("precision", ["float32", "binary"])
@pytest.mark.parametrize("ranked", [None, {"q0": ["d3", "d1"], "q1": [], "q2": ["d9"], "q3": ["d0", "d5", "d2"]}])
def test_it_finds_what_mteb_finds(precision, ranked, view, data, search):
    options = Prompts({"query": "q: ", "document": "d: "}), 16, precision
    expected = search(SearchEncoderWrapper(view(*options)), data, top_ranked=ranked)
    actual = search(view(*options), data, top_ranked=ranked)
    assert set(actual) == set(expected)
    for query in expected:
        # The worst of three may tie with the fourth.
        assert sorted(actual[query].values()) == pytest.approx(sorted(expected[query].values()), abs=1e-5)
        if precision == "float32":
            assert set(actual[query]) == set(expected[query])


def test_int8_documents_are_calibrated_on_their_corpus_and_found_by_queries_in_float32(store, view, data, search):
    searcher, (corpus, queries) = view(dimension=16, precision="int8"), data
    # The corpus of another subset does not change the scale.
    search(searcher, (corpus.select(range(2)), queries))
    similarities = search(searcher, data)
    documents = unit_length(store.encode([f"{row['title']} {row['text']}" for row in corpus], "")[:, :16])
    asked = store.encode(queries["text"], "")[:, :16]
    stored = quantized(documents, "int8", calibrate(documents))
    cosines = asked @ stored.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(stored, axis=1)
    expected = np.sort(cosines, axis=1)[:, -3:]
    np.testing.assert_allclose([sorted(each.values()) for each in similarities.values()], expected, atol=1e-5)


def test_blocks_make_no_difference_and_few_documents_are_all_found(monkeypatch, view, data, search):
    whole = search(view(), data, top_k=50)
    assert all(len(documents) == len(data[0]) for documents in whole.values())
    monkeypatch.setattr(models, "_SIMILARITIES", 3 * len(data[0]))
    for query, documents in search(view(), data, top_k=50).items():
        assert documents == pytest.approx(whole[query], abs=1e-6)


def test_a_corpus_is_read_once_for_all_views(monkeypatch, store, view, data, search):
    read, make = [], models.create_dataloader
    monkeypatch.setattr(
        models, "create_dataloader", lambda dataset, **options: read.append(0) or make(dataset, **options)
    )
    for dimension in (32, 16):
        search(view(dimension=dimension), data)
    assert len(read) == 2
    store.forget(1 << 30)
    search(view(dimension=8), data)
    assert len(read) == 4
