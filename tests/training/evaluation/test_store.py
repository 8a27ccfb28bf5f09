from __future__ import annotations

import numpy as np

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation.store import EmbeddingStore


def test_every_prompt_and_text_is_encoded_once(tiny_model, tiny_tokenizer, sentences):
    store = EmbeddingStore(build_sentence_transformer(tiny_model, tiny_tokenizer))
    assert store.texts_per_second is None
    first = store.encode([*sentences, *sentences], "")
    assert store.encoded == len(sentences) and store.texts_per_second > 0
    store.encode(sentences, "")
    assert store.encoded == len(sentences)
    store.encode(sentences, "q: ")
    assert store.encoded == 2 * len(sentences)
    np.testing.assert_array_equal(first[: len(sentences)], first[len(sentences) :])


def test_embeddings_are_those_of_the_model_in_the_order_asked_for(tiny_model, tiny_tokenizer, sentences):
    model = build_sentence_transformer(tiny_model, tiny_tokenizer)
    store = EmbeddingStore(model)
    for texts in (sentences[:1], sentences[3:7], sentences[::-1]):
        np.testing.assert_allclose(store.encode(texts, "q: "), model.encode(texts, prompt="q: "), atol=1e-5)
    assert len(store.known) == len(sentences)


def test_only_what_takes_more_than_allowed_is_forgotten(tiny_model, tiny_tokenizer, sentences):
    store = EmbeddingStore(build_sentence_transformer(tiny_model, tiny_tokenizer))
    before = store.encode(sentences, "")
    store.forget(most_bytes=before.nbytes)
    assert len(store.known) == len(sentences)
    store.forget(most_bytes=before.nbytes - 1)
    assert len(store.known) == 0
    np.testing.assert_array_equal(store.encode(sentences, ""), before)
    assert store.encoded == 2 * len(sentences)
