"""Searching by a view finds what mteb's own wrapper around an encoder finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("mteb")

from datasets import Dataset
from mteb.models import ModelMeta
from mteb.models.search_wrappers import SearchEncoderWrapper

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation import search
from training.evaluation.encoding import EncoderView
from training.evaluation.local.pair_tasks import pair_tasks
from training.evaluation.models import Prompts
from training.evaluation.quantization import calibrate, quantized, unit_length
from training.evaluation.search import SearchView, best_documents
from training.evaluation.store import EmbeddingStore


@pytest.fixture
def store(tiny_model, tiny_tokenizer) -> EmbeddingStore:
    return EmbeddingStore(build_sentence_transformer(tiny_model, tiny_tokenizer))


@pytest.fixture
def data(sentences):
    corpus = [{"id": f"d{n}", "title": text[:5], "text": text} for n, text in enumerate(sentences)]
    queries = [{"id": f"q{n}", "text": text[::-1]} for n, text in enumerate(sentences[:4])]
    return Dataset.from_list(corpus), Dataset.from_list(queries)


@pytest.fixture
def metadata(tmp_path, sentences):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"query": sentences, "passage": sentences}), tmp_path / "pairs.parquet")
    return pair_tasks(tmp_path / "pairs.parquet", "Names")[0].metadata


def found(searcher, data, metadata, **options):
    corpus, queries = data
    shared = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    searcher.index(corpus, num_proc=None, **shared)
    return searcher.search(queries, num_proc=None, **{"top_k": 3, **options}, **shared)


@pytest.mark.parametrize("precision", ["float32", "binary"])
@pytest.mark.parametrize("ranked", [None, {"q0": ["d3", "d1"], "q1": [], "q2": ["d9"], "q3": ["d0", "d5", "d2"]}])
def test_it_finds_what_mteb_finds(precision, ranked, store, data, metadata):
    prompts = Prompts({"query": "q: ", "document": "d: "})
    arguments = (store, ModelMeta.create_empty({"name": "a/b"}), 16, precision, prompts)
    ours, theirs = SearchView(*arguments), SearchEncoderWrapper(EncoderView(*arguments))
    expected = found(theirs, data, metadata, top_ranked=ranked)
    actual = found(ours, data, metadata, top_ranked=ranked)
    assert set(actual) == set(expected)
    for query in expected:
        # The worst of three may tie with the fourth.
        assert sorted(actual[query].values()) == pytest.approx(sorted(expected[query].values()), abs=1e-5)
        if precision == "float32":
            assert set(actual[query]) == set(expected[query])


def test_int8_documents_are_calibrated_on_the_corpus_and_found_by_queries_in_float32(store, data, metadata):
    view = SearchView(store, ModelMeta.create_empty({"name": "a/b"}), 16, "int8")
    similarities = found(view, data, metadata)
    corpus, queries = data
    documents = unit_length(store.encode([f"{row['title']} {row['text']}" for row in corpus], "")[:, :16])
    # Queries stay as they are.
    asked = store.encode(queries["text"], "")[:, :16]
    stored = quantized(documents, "int8", calibrate(documents))
    cosines = asked @ stored.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(stored, axis=1)
    expected = np.sort(cosines, axis=1)[:, -3:]
    np.testing.assert_allclose([sorted(each.values()) for each in similarities.values()], expected, atol=1e-5)


def test_the_corpus_of_another_subset_does_not_change_the_scale_of_int8(store, data, metadata):
    corpus, queries = data
    view, fresh = (SearchView(store, ModelMeta.create_empty({"name": "a/b"}), 16, "int8") for _ in range(2))
    found(view, (corpus.select(range(2)), queries), metadata)
    assert found(view, data, metadata) == found(fresh, data, metadata)


def test_chunks_make_no_difference(monkeypatch, store, data, metadata):
    view = SearchView(store, ModelMeta.create_empty({"name": "a/b"}), 32)
    whole = found(view, data, metadata)
    monkeypatch.setattr(search, "_DOCUMENTS", 3)
    monkeypatch.setattr(search, "_QUERIES", 2)
    for query, documents in found(view, data, metadata).items():
        assert documents == pytest.approx(whole[query], abs=1e-6)


def test_fewer_documents_than_asked_for_are_all_found():
    queries, documents = torch.eye(2), torch.eye(2)
    values, places = best_documents(queries, iter([(0, documents[:1]), (1, documents[1:])]), lambda a, b: a @ b.T, 5)
    assert values.sort().values.tolist() == [[0, 1], [0, 1]] and places.sort().values.tolist() == [[0, 1], [0, 1]]


def test_a_corpus_is_read_once_for_all_views(monkeypatch, store, data, metadata):
    read, make = [], search.create_dataloader

    def watched(dataset, **options):
        read.append(dataset)
        return make(dataset, **options)

    monkeypatch.setattr(search, "create_dataloader", watched)
    for dimension in (32, 16):
        found(SearchView(store, ModelMeta.create_empty({"name": "a/b"}), dimension), data, metadata)
    assert len(read) == 2
    store.forget(1 << 30)
    found(SearchView(store, ModelMeta.create_empty({"name": "a/b"}), 8), data, metadata)
    assert len(read) == 4
