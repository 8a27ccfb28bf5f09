"""The objectives: the values of the published training code, and one pass over all widths equal to a loop over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CoSENTLoss,
    DistillKLDivLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from modeling_f2llm import (
    cosent_loss,
    distillation_loss,
    false_negatives,
    hard_negative_loss,
    in_batch_loss,
    matryoshka_dims,
    matryoshka_weights,
    score_distillation_loss,
)

# Values and gradient norms computed with the published training code; "about" in the file says from which inputs.
REFERENCE = json.loads((Path(__file__).parent / "loss_values.json").read_text())["cases"]
DIMS = [32, 16, 8]


class Inputs(NamedTuple):
    query: Tensor
    positive: Tensor
    negatives: Tensor
    teacher_query: Tensor
    teacher_positive: Tensor
    teacher_negatives: Tensor


def inputs_of(seed, batch, negatives, dim, teacher_dim):
    random = np.random.RandomState(seed)

    def draw(*shape):
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    query, noise_p, noise_n = draw(batch, dim), draw(batch, dim), draw(batch, negatives, dim)
    teachers = draw(batch, teacher_dim), draw(batch, teacher_dim), draw(batch, negatives, teacher_dim)
    positive, negatives_ = 0.15 * query + noise_p, 0.1 * query[:, None] + noise_n
    return Inputs(*(tensor.requires_grad_() for tensor in (query, positive, negatives_)), *teachers)


def small_inputs():
    return inputs_of(seed=7, batch=6, negatives=3, dim=32, teacher_dim=48)


def gradients(loss, *tensors):
    return list(torch.autograd.grad(loss, tensors))


def naive_loss(logits_of, labels, dims):
    """Width by width, each with its own normalisation, as in the published code."""
    weights = matryoshka_weights(dims)
    return sum(w * cross_entropy(logits_of(dim), labels) for dim, w in zip(dims, weights, strict=True))


def naive_in_batch(query, positive, dims, temperature=0.05):
    def logits_of(dim):
        return normalize(query[:, :dim], dim=-1) @ normalize(positive[:, :dim], dim=-1).T / temperature

    return naive_loss(logits_of, torch.arange(len(query)), dims)


def naive_hard(query, positive, negatives, dims, temperature=0.05):
    candidates = torch.cat([positive[:, None], negatives], dim=1)

    def logits_of(dim):
        q, c = normalize(query[:, :dim], dim=-1), normalize(candidates[..., :dim], dim=-1)
        return (q[:, None] * c).sum(-1) / temperature

    return naive_loss(logits_of, torch.zeros(len(query), dtype=torch.long), dims)


@pytest.fixture(params=REFERENCE, ids=lambda case: f"dim{case['dim']}-teacher{case['teacher_dim']}")
def case(request):
    return request.param


@pytest.fixture
def inputs(case):
    return inputs_of(*(case[name] for name in ("seed", "batch", "negatives", "dim", "teacher_dim")))


@pytest.mark.parametrize("kind", ["full", "matryoshka"])
def test_losses_and_gradients_have_the_published_values(case, inputs, kind):
    dims = sorted(case["matryoshka_dims"], reverse=True) if kind == "matryoshka" else None
    query, positive, negatives = inputs[:3]

    in_batch = in_batch_loss(query, positive, dims=dims)
    hard = hard_negative_loss(query, positive, negatives, dims=dims)
    assert in_batch.item() == pytest.approx(case[kind]["in_batch"], rel=1e-5)
    assert hard.item() == pytest.approx(case[kind]["hard"], rel=1e-5)

    norms = [grad.norm().item() for grad in gradients(in_batch, query, positive)]
    assert norms == pytest.approx(case[kind]["grad_in_batch"], rel=1e-5)
    norms = [grad.norm().item() for grad in gradients(hard, query, positive, negatives)]
    assert norms == pytest.approx(case[kind]["grad_hard"], rel=1e-5)


def test_distillation_has_the_published_value(case, inputs):
    students, teachers = inputs[:3], inputs[3:]
    loss = sum(distillation_loss(student, teacher) for student, teacher in zip(students, teachers, strict=True))
    assert loss.item() == pytest.approx(case["distillation"], rel=1e-5)
    assert matryoshka_dims(case["dim"]) == sorted(case["matryoshka_dims"], reverse=True)


@pytest.mark.parametrize("dims", [None, [32], [32, 16, 8], [24, 5, 1], [16]])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_one_pass_equals_the_loop_over_widths(dims, temperature):
    inputs = small_inputs()
    query, positive, negatives = inputs[:3]
    for loss, naive, tensors in [
        (in_batch_loss, naive_in_batch, (query, positive)),
        (hard_negative_loss, naive_hard, (query, positive, negatives)),
    ]:
        actual = loss(*tensors, dims=dims, temperature=temperature)
        expected = naive(*tensors, dims or [32], temperature)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(gradients(actual, *tensors), gradients(expected, *tensors), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_in_batch_loss_equals_sentence_transformers():
    query, positive = small_inputs()[:2]
    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    ranking = MultipleNegativesRankingLoss(model, scale=20.0)
    expected = sum(
        weight * ranking.compute_loss_from_embeddings([query[:, :dim], positive[:, :dim]], None)
        for dim, weight in zip(DIMS, matryoshka_weights(DIMS), strict=True)
    )
    torch.testing.assert_close(in_batch_loss(query, positive, dims=DIMS), expected)


@pytest.mark.parametrize("dims", [None, DIMS])
def test_cosent_equals_a_loop_over_pairs_and_sentence_transformers(dims):
    query, passage = small_inputs()[:2]
    scores = torch.tensor([0.5, 3.0, -1.0, 0.5, 2.0, 3.0])
    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    theirs, looped = CoSENTLoss(model, scale=20.0), 0.0
    widths = [32] if dims is None else dims
    for dim, weight in zip(widths, matryoshka_weights(widths), strict=True):
        cosines = torch.cosine_similarity(query[:, :dim], passage[:, :dim])
        pairs = [(i, j) for i in range(6) for j in range(6) if scores[i] > scores[j]]
        looped += weight * torch.log(1 + sum(torch.exp((cosines[j] - cosines[i]) / 0.05) for i, j in pairs))
    loss = cosent_loss(query, passage, scores, dims=dims)
    torch.testing.assert_close(loss, looped)
    for ours, wanted in zip(gradients(loss, query, passage), gradients(looped, query, passage), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    if dims is None:
        torch.testing.assert_close(loss, theirs.compute_loss_from_embeddings([query, passage], scores))
    # Only the order of the scores counts, and equal ones teach nothing.
    assert cosent_loss(query, passage, scores.exp(), dims=dims) == loss
    equal = cosent_loss(query, passage, torch.ones(6), dims=dims)
    assert equal == 0 and not gradients(equal, query)[0].any()
    assert cosent_loss(query[:0], passage[:0], scores[:0], dims=dims) == 0


@pytest.mark.parametrize(
    ("width", "published"),
    [
        (320, [1, 0.447, 0.211, 0.112, 0.063, 0.037, 0.023]),
        (1024, [1, 0.354, 0.167, 0.088, 0.050, 0.030, 0.018, 0.011]),
        (896, [1, 0.378, 0.178, 0.095, 0.054, 0.032, 0.019, 0.012]),
    ],
)
def test_matryoshka_weights_are_the_published_ones(width, published):
    assert matryoshka_weights(matryoshka_dims(width)) == pytest.approx(published, abs=6e-4)  # given to three places


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        *((dims, "do not fit embeddings of 32 dimensions") for dims in ([64, 32], [33], [32, 0], [])),
        *((dims, "fall strictly") for dims in ([8, 16, 32], [32, 32, 8])),
    ],
)
def test_faulty_dimensions_are_refused(dims, message):
    query, positive, negatives = small_inputs()[:3]
    with pytest.raises(ValueError, match=message):
        in_batch_loss(query, positive, dims=dims)
    with pytest.raises(ValueError, match=message):
        hard_negative_loss(query, positive, negatives, dims=dims)


@pytest.mark.parametrize("dims", [None, DIMS])
@pytest.mark.parametrize("negatives", [None, torch.empty(6, 0, 32)], ids=["none", "k=0"])
def test_no_hard_negatives_give_zero(negatives, dims):
    query, positive = small_inputs()[:2]
    loss = hard_negative_loss(query, positive, negatives, dims=dims)
    assert loss.item() == 0
    assert all(grad.count_nonzero() == 0 for grad in gradients(loss, query, positive))


def test_an_empty_batch_gives_zero():
    query, positive, negatives = (torch.empty(0, *shape, requires_grad=True) for shape in ([32], [32], [3, 32]))
    for loss in (
        in_batch_loss(query, positive, dims=DIMS),
        in_batch_loss(query, small_inputs().positive, dims=DIMS),
        hard_negative_loss(query, positive, negatives, dims=DIMS),
        distillation_loss(query, torch.empty(0, 64)),
        distillation_loss(torch.empty(6, 0, 32) + 0 * query.sum(), torch.empty(6, 0, 48)),
    ):
        assert loss.item() == 0
        assert gradients(loss, query)[0].shape == query.shape


@pytest.mark.parametrize("dims", [None, DIMS])
def test_two_processes_with_label_offsets_equal_one(dims):
    query, positive = small_inputs()[:2]
    whole = in_batch_loss(query, positive, dims=dims)
    halves = [
        in_batch_loss(query[rows], positive, dims=dims, labels=torch.tensor(rows)) for rows in ([0, 1, 2], [3, 4, 5])
    ]
    parts = torch.stack(halves).mean()
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradients(parts, query, positive), gradients(whole, query, positive))


def test_labels_point_into_distinct_positives():
    query, positive = small_inputs()[:2]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = in_batch_loss(query, positive[order], dims=DIMS, labels=order.argsort())
    torch.testing.assert_close(shuffled, in_batch_loss(query, positive, dims=DIMS))


@pytest.mark.parametrize("excludes", [False, True])
def test_blocks_of_queries_equal_the_whole_in_less_memory(monkeypatch, excludes):
    generator = torch.Generator().manual_seed(0)
    query, positive = (torch.randn(65, 24, generator=generator, requires_grad=True) for _ in range(2))
    exclude = (torch.rand(65, 65, generator=generator) < 0.2).fill_diagonal_(False) if excludes else None
    keys = {"dims": [24, 16, 8], "exclude": exclude}
    kept = []

    def found():
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x
        )
        with keep:
            loss = in_batch_loss(query, positive, **keys)
        most = max(kept)
        kept.clear()
        return loss, gradients(loss, query, positive), most

    whole, gradient, matrix = found()
    monkeypatch.setattr("modeling_f2llm.losses.MOST_COSINES", 65 * 20)
    blocks, of_blocks, most = found()
    torch.testing.assert_close(blocks, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_blocks, gradient, rtol=1e-5, atol=1e-7)
    assert matrix == 65 * 65 and most < 65 * 65


def test_an_excluded_positive_counts_as_absent():
    query, positive = small_inputs()[:2]
    exclude = torch.zeros(6, 6, dtype=torch.bool)
    exclude[:5, 5] = True
    torch.testing.assert_close(
        in_batch_loss(query[:5], positive, dims=DIMS, exclude=exclude[:5]),
        in_batch_loss(query[:5], positive[:5], dims=DIMS),
    )
    grad = gradients(in_batch_loss(query[:5], positive, dims=DIMS, exclude=exclude[:5]), positive)[0]
    assert grad[5].count_nonzero() == 0
    assert (grad[:5].abs().amax(dim=1) > 0).all()
    nothing, diagonal = torch.zeros(6, 6, dtype=torch.bool), torch.eye(6, dtype=torch.bool)
    assert in_batch_loss(query, positive, dims=DIMS, exclude=nothing) == in_batch_loss(query, positive, dims=DIMS)
    assert in_batch_loss(query, positive, dims=DIMS, exclude=~diagonal).item() == 0


def test_an_excluded_negative_counts_as_absent():
    query, positive, negatives = small_inputs()[:3]
    exclude = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    loss = hard_negative_loss(query, positive, negatives, dims=DIMS, exclude=exclude)
    rows = [
        hard_negative_loss(query[row : row + 1], positive[row : row + 1], negatives[row : row + 1, ~gone], dims=DIMS)
        for row, gone in enumerate(exclude)
    ]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    grad = gradients(loss, negatives)[0]
    assert ((grad == 0).all(dim=2) == exclude).all()
    whole = [
        hard_negative_loss(query, positive, negatives, dims=DIMS, exclude=mask) for mask in (None, exclude & False)
    ]
    assert whole[0] == whole[1]
    assert torch.equal(*(gradients(each, negatives)[0] for each in whole))


def test_zero_vectors_equal_the_loop_and_keep_gradients_finite():
    query, positive, negatives = (tensor.detach().clone() for tensor in small_inputs()[:3])
    query[0] = positive[1] = negatives[2, 0] = 0
    query[3, :8] = 0  # the leading dimensions only
    tensors = [tensor.requires_grad_() for tensor in (query, positive, negatives)]
    torch.testing.assert_close(
        in_batch_loss(*tensors[:2], dims=DIMS), naive_in_batch(*tensors[:2], DIMS), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        hard_negative_loss(*tensors, dims=DIMS), naive_hard(*tensors, DIMS), rtol=1e-5, atol=1e-6
    )
    for loss, own in [(in_batch_loss(*tensors[:2], dims=DIMS), tensors[:2]), (hard_negative_loss(*tensors), tensors)]:
        assert all(grad.isfinite().all() for grad in gradients(loss, *own))


def test_bf16_embeddings_under_autocast_are_compared_in_fp32():
    inputs = small_inputs()
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:3]]
    singles = [tensor.detach().float() for tensor in halves]

    def losses(query, positive, negatives):
        return [
            in_batch_loss(query, positive, dims=DIMS),
            hard_negative_loss(query, positive, negatives, dims=DIMS),
            distillation_loss(query, inputs.teacher_query.bfloat16().to(query.dtype)),
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = losses(*halves)
    expected = losses(*singles)
    assert [loss.dtype for loss in actual] == [torch.float32] * 3
    assert [loss.item() for loss in actual] == [loss.item() for loss in expected]
    assert gradients(actual[0], halves[0])[0].dtype == torch.bfloat16


def test_distillation_reads_the_leading_dimensions_of_a_wider_teacher():
    inputs = small_inputs()
    student, teacher = inputs.query, inputs.teacher_query
    loss = distillation_loss(student, teacher)
    torch.testing.assert_close(loss, (student - teacher[:, :32]).square().mean())
    assert loss == distillation_loss(student, teacher[:, :32])
    torch.testing.assert_close(gradients(loss, student)[0], 2 * (student - teacher[:, :32]) / student.numel())
    flat = distillation_loss(inputs.negatives.flatten(0, 1), inputs.teacher_negatives.flatten(0, 1))
    assert distillation_loss(inputs.negatives, inputs.teacher_negatives) == flat
    # No gradient reaches the teacher.
    itself = student.detach().requires_grad_()
    loss = distillation_loss(student, itself)
    assert loss.item() == 0 and torch.autograd.grad(loss, [student, itself], allow_unused=True)[1] is None
    with pytest.raises(ValueError, match="31 dimensions do not cover the student's 32"):
        distillation_loss(student, torch.zeros(6, 31))


@pytest.mark.parametrize("dims", [None, DIMS])
@pytest.mark.parametrize("shared", [True, False])
def test_score_distillation_equals_the_loop_and_that_of_sentence_transformers(dims, shared):
    query, positive, negatives = small_inputs()[:3]
    candidates = positive if shared else torch.cat([positive[:, None], negatives], dim=1)
    scores = 3 * torch.randn(candidates.shape[:2] if not shared else (6, 6), generator=torch.Generator().manual_seed(0))
    exclude = scores > 2.5
    # A row of one candidate, and one of none.
    exclude[0], exclude[1] = torch.arange(scores.shape[1]) > 0, True
    widths, looped = dims or [32], 0.0
    for dim, weight in zip(widths, matryoshka_weights(widths), strict=True):
        for row in range(2, 6):
            of_row = [each for each in range(scores.shape[1]) if not exclude[row, each]]
            own = candidates[of_row] if shared else candidates[row, of_row]
            cosines = torch.cosine_similarity(query[row, :dim], own[:, :dim], dim=-1)
            wanted, found = scores[row, of_row].softmax(0), (cosines / 0.1).softmax(0)
            looped += weight * (wanted * (wanted / found).log()).sum() / 6
    loss = score_distillation_loss(query, candidates, scores, temperature=0.1, dims=dims, exclude=exclude)
    torch.testing.assert_close(loss, looped)
    for ours, theirs in zip(gradients(loss, query, candidates), gradients(looped, query, candidates), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # Its own scores teach a model nothing.
    with torch.no_grad():
        own = torch.cosine_similarity(query[:, None], candidates[None] if shared else candidates, dim=-1) / 0.1
    assert score_distillation_loss(query, candidates, own, temperature=0.1) < 1e-6
    if dims is None:
        columns = [each.expand(6, -1) for each in candidates] if shared else candidates.unbind(1)
        theirs = DistillKLDivLoss(None, torch.cosine_similarity, temperature=0.1)
        value = theirs.compute_loss_from_embeddings([query, *columns], 0.1 * scores) / 0.1**2
        torch.testing.assert_close(score_distillation_loss(query, candidates, scores, temperature=0.1), value)
    assert score_distillation_loss(query[:0], positive, scores[:0]) == 0


def test_false_negatives_are_those_nearer_than_the_positive_and_the_margin():
    query, positive, negatives = small_inputs()[:3]

    def near(row, each):
        return torch.cosine_similarity(query[row], each, dim=0)

    def limits(margin):
        # The positive itself is not above its own cosine.
        return [near(row, positive[row]) + margin + 1e-6 for row in range(6)]

    for margin in (-0.2, 0.0, 0.1):
        own = [[near(i, each) > limit for each in negatives[i]] for i, limit in enumerate(limits(margin))]
        assert false_negatives(query, positive, negatives, margin).tolist() == own
        shared = [[near(i, each) > limit for each in positive] for i, limit in enumerate(limits(margin))]
        found = false_negatives(query, positive, positive, margin)
        assert found.tolist() == shared and found.any() and not found.all() and not found.requires_grad
