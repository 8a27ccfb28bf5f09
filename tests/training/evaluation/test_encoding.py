from __future__ import annotations

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings

pytest.importorskip("mteb")

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation.encoding import EmbeddingStore, quantized


def test_every_prompt_and_text_is_encoded_once(tiny_model, tiny_tokenizer, sentences):
    store = EmbeddingStore(build_sentence_transformer(tiny_model, tiny_tokenizer))
    first = store.encode([*sentences, *sentences], "")
    assert store.encoded == len(sentences)
    store.encode(sentences, "")
    assert store.encoded == len(sentences)
    store.encode(sentences, "q: ")
    assert store.encoded == 2 * len(sentences)
    np.testing.assert_array_equal(first[: len(sentences)], first[len(sentences) :])


def test_quantized_is_what_sentence_transformers_stores():
    embeddings = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    ranges = np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])
    expected = quantize_embeddings(embeddings, "int8", ranges=ranges)
    np.testing.assert_array_equal(quantized(embeddings, "int8", ranges), expected)
    packed = np.packbits(quantized(embeddings, "binary", ranges) > 0, axis=1)
    np.testing.assert_array_equal(packed, quantize_embeddings(embeddings, "ubinary"))
