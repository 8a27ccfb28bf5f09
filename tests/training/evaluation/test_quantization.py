from __future__ import annotations

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

from training.evaluation.quantization import calibrate, quantized


def test_quantized_is_what_sentence_transformers_stores():
    embeddings = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float32)
    ranges = calibrate(embeddings)
    expected = quantize_embeddings(embeddings, "int8", ranges=ranges)
    np.testing.assert_array_equal(quantized(embeddings, "int8", ranges), expected)
    packed = np.packbits(quantized(embeddings, "binary", ranges) > 0, axis=1)
    np.testing.assert_array_equal(packed, quantize_embeddings(embeddings, "ubinary"))
    assert quantized(embeddings, "float32", ranges) is embeddings


def test_values_out_of_the_calibrated_range_stay_at_its_ends():
    ranges = np.array([[-1.0], [1.0]], np.float32)
    inside = quantized(np.array([[-1.0], [1.0]], np.float32), "int8", ranges)
    outside = quantized(np.array([[-5.0], [5.0]], np.float32), "int8", ranges)
    np.testing.assert_array_equal(outside, inside)


def test_dimensions_in_which_all_are_alike_are_no_division_by_zero():
    embeddings = np.ones((1, 8), np.float32)
    assert np.isfinite(quantized(embeddings, "int8", calibrate(embeddings))).all()
