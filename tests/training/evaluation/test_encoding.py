"""Texts are encoded once; stored precisions are compared as a vector index compares them."""

from __future__ import annotations

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

from training.evaluation.encoding import calibrate, quantized, unit_length


def test_every_prompt_and_text_is_encoded_once_as_the_model_does(store, sentences):
    first = store.encode([*sentences, *sentences], "")
    assert store.encoded == len(sentences) and store.seconds > 0
    np.testing.assert_array_equal(first[: len(sentences)], first[len(sentences) :])
    store.encode(sentences, "")
    assert store.encoded == len(sentences)
    for texts in (sentences[:1], sentences[3:7], sentences[::-1]):
        np.testing.assert_allclose(store.encode(texts, "q: "), store.model.encode(texts, prompt="q: "), atol=1e-5)
    assert store.encoded == 2 * len(sentences)


def test_only_embeddings_over_the_limit_are_forgotten(store, sentences):
    before = store.encode(sentences, "")
    store.forget(most_bytes=before.nbytes)
    np.testing.assert_array_equal(store.encode(sentences, ""), before)
    assert store.encoded == len(sentences)
    store.forget(most_bytes=before.nbytes - 1)
    np.testing.assert_array_equal(store.encode(sentences, ""), before)
    assert store.encoded == 2 * len(sentences)


def _embeddings(rows, width=32, seed=0):
    """Unit vectors far from the origin, with dimensions of different scales, as those of a model are."""
    drawn = np.random.default_rng(seed).normal(size=(rows, width)) / np.arange(1, width + 1)
    drawn += np.random.default_rng(1).normal(size=width) / 5
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def test_int8_is_what_faiss_stores_and_finds():
    faiss = pytest.importorskip("faiss")
    texts, queries = _embeddings(2000), _embeddings(100, seed=2)
    index = faiss.IndexScalarQuantizer(32, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2)
    index.train(texts[:1500])
    index.add(texts)
    stored = quantized(texts, "int8", calibrate(texts[:1500]))
    np.testing.assert_allclose(stored, index.reconstruct_n(0, len(texts)), atol=1e-6)
    nearest, exact = np.argsort(-queries @ unit_length(stored).T, axis=1)[:, :10], index.search(queries, 10)[1]
    assert np.mean([len(set(one) & set(other)) / 10 for one, other in zip(nearest, exact, strict=True)]) > 0.995


def test_binary_is_what_sentence_transformers_stores_and_int8_clips():
    embeddings = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    packed = np.packbits(quantized(embeddings, "binary") > 0, axis=1)
    np.testing.assert_array_equal(packed, quantize_embeddings(embeddings, "ubinary"))
    ranges = np.array([[-1.0], [1.0]], np.float32)
    inside, outside = (quantized(np.array([[-end], [end]], np.float32), "int8", ranges) for end in (1.0, 5.0))
    np.testing.assert_array_equal(outside, inside)
    np.testing.assert_array_equal(quantized(np.ones((3, 8), np.float32), "int8"), np.ones((3, 8)))
