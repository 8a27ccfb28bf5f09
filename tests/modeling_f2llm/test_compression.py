"""Spread-out and quantized embeddings: the formulas by plain loops, the values of an evaluation, and the gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from torch.nn.functional import normalize

from modeling_f2llm.compression import PRECISIONS, quantize, spread_loss
from modeling_f2llm.losses import matryoshka_weights
from training.evaluation.encoding import calibrate, quantized, unit_length

DIMS = [16, 8, 4]


def texts_of(seed=0, rows=6, width=16, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) + offset).requires_grad_()


@pytest.mark.parametrize("dims", [None, DIMS])
@pytest.mark.parametrize("exclude", [[], [(0, 1), (1, 0), (4, 2), (2, 4)]])
def test_spread_is_the_loop_over_pairs(dims, exclude):
    texts = texts_of(offset=0.5)
    wanted, widths = 0.0, dims or [16]
    for width, weight in zip(widths, matryoshka_weights(widths), strict=True):
        pairs = [(i, j) for i in range(6) for j in range(6) if i != j and (i, j) not in exclude]
        cosines = torch.stack([torch.cosine_similarity(texts[i, :width], texts[j, :width], dim=0) for i, j in pairs])
        wanted += weight * (cosines.mean() ** 2 + max(0, (cosines**2).mean() - 1 / width))
    mask = torch.zeros(6, 6, dtype=torch.bool)
    for pair in exclude:
        mask[pair] = True
    loss = spread_loss(texts, dims=dims, exclude=mask if exclude else None)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each, texts)[0] for each in (loss, wanted)), rtol=1e-4, atol=1e-6)


def test_spread_is_that_of_sentence_transformers_and_zero_for_orthogonal_texts():
    theirs = GlobalOrthogonalRegularizationLoss(SentenceTransformer(modules=[torch.nn.Identity()]), aggregation="sum")
    sides = [texts_of(0, offset=0.5), texts_of(1, rows=9)]
    wanted = sum(theirs.compute_loss_from_embeddings(sides).values())
    torch.testing.assert_close(sum(map(spread_loss, sides)), wanted)
    assert spread_loss(torch.eye(4)) == 0 < spread_loss(texts_of(offset=1.0)) < spread_loss(torch.ones(5, 16))
    # No pair, no loss, no NaN.
    for lonely in (texts_of(rows=1), texts_of(rows=0)):
        loss = spread_loss(lonely, dims=DIMS)
        assert loss == 0 and not torch.autograd.grad(loss, lonely)[0].any()
    related = spread_loss(sides[0], exclude=torch.ones(6, 6, dtype=torch.bool))
    assert related == 0 and not torch.autograd.grad(related, sides[0])[0].any()


@pytest.mark.parametrize("width", DIMS)
def test_quantized_values_are_those_of_an_evaluation(width):
    embeddings = texts_of(rows=50)[:, :width].detach()
    embeddings[3] = embeddings[4, 0] = 0
    stored = torch.arange(10, 50)
    queries, documents = quantize(embeddings, "int8", stored)
    units = unit_length(embeddings.numpy())
    np.testing.assert_allclose(queries, units, atol=1e-7)
    found = quantized(queries.numpy(), "int8", calibrate(queries[stored].numpy()))
    np.testing.assert_array_equal(documents, found)
    queries, documents = quantize(embeddings, "binary", stored)
    assert queries is documents
    np.testing.assert_array_equal(documents, quantized(embeddings.numpy(), "binary"))


def test_equal_values_of_a_dimension_have_no_step():
    embeddings = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, -1.0]])
    _, documents = quantize(embeddings, "int8", torch.tensor([0, 1]))
    torch.testing.assert_close(documents[:2], normalize(embeddings[:2], dim=-1))
    assert documents.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_passes_by_the_rounding(precision):
    embeddings, factors = texts_of(rows=12), texts_of(1, rows=12).detach()
    vectors = normalize(embeddings, dim=-1)
    smooth = vectors if precision == "int8" else torch.tanh(embeddings / embeddings.square().mean(-1, True).sqrt())
    for each in quantize(embeddings, precision, torch.arange(12)):
        found, wanted = (
            torch.autograd.grad((one * factors).sum(), embeddings, retain_graph=True)[0] for one in (each, smooth)
        )
        torch.testing.assert_close(found, wanted)
        # The scale of an embedding changes nothing, as in the other terms; a text of zeros has no infinite gradient.
        assert (found * embeddings).sum(1).abs().max() < 1e-5
    empty = torch.zeros(2, 4, requires_grad=True)
    gradient = torch.autograd.grad(sum(each.sum() for each in quantize(empty, precision, torch.arange(2))), empty)[0]
    assert gradient.isfinite().all() and math.isfinite(gradient.sum())
