"""The objective: its terms are the losses of the embeddings that the batch's indices point to."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from modeling_f2llm.losses import in_batch_loss
from training.trainer.trainer import Objective

WIDTH, DIMS = 16, [16, 8, 4]


def batch_of(task_type="retrieval", **indices):
    """Three rows; text 2 is the negative of two rows, text 5 negative of one and positive of another."""
    default = {"query": [0, 3, 6], "positive": [1, 4, 5], "negatives": [[2, 5], [7, 2], [8, 0]]}
    return {"task_type": task_type, **{name: torch.tensor(index) for name, index in {**default, **indices}.items()}}


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, WIDTH, generator=generator, requires_grad=True)


def gathered(embeddings, batch):
    return tuple(embeddings[batch[name]] for name in ("query", "positive", "negatives"))


def test_terms_are_cross_entropies_of_cosines(embeddings):
    # The formulas of the published training, written out at full width.
    batch = batch_of()
    query, positive, negatives = (normalize(part, dim=-1) for part in gathered(embeddings, batch))
    terms = Objective().terms(embeddings, batch)
    in_batch = cross_entropy(query @ positive.T / 0.05, torch.arange(3))
    candidates = torch.cat([positive[:, None], negatives], dim=1)
    hard = cross_entropy((query[:, None] * candidates).sum(-1) / 0.05, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(terms["in_batch"], in_batch)
    torch.testing.assert_close(terms["hard"], hard)


@pytest.mark.parametrize("task_type", ["clustering", "classification"])
@pytest.mark.parametrize("mask_duplicates", [False, True])
def test_other_task_types_have_no_in_batch_term(embeddings, task_type, mask_duplicates):
    objective = Objective(0.1, DIMS, mask_duplicates)
    terms = objective.terms(embeddings, batch_of(task_type))
    assert list(terms) == ["hard"]
    assert terms["hard"].item() == objective.terms(embeddings, batch_of())["hard"].item()


@pytest.mark.parametrize("dims", [None, DIMS])
@pytest.mark.parametrize(
    ("query", "positive", "left_out"),
    [
        ([0, 0, 6], [1, 4, 5], {(0, 1), (1, 0)}),  # one query, two answers
        ([0, 3, 6], [1, 4, 1], {(0, 2), (2, 0)}),  # two queries, one answer
        ([0, 0, 6], [1, 4, 4], {(0, 1), (1, 0), (1, 2), (2, 1)}),
        ([0, 0, 0], [1, 1, 1], {(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)}),
        ([0, 1, 2], [1, 2, 0], {(0, 2), (1, 0), (2, 1)}),  # a query that is another row's positive
        ([0, 3, 6], [0, 4, 3], {(1, 2)}),  # the other way round it is a negative; a row's own positive always stays
    ],
)
def test_masked_duplicates_are_left_out_of_the_in_batch_negatives(embeddings, dims, query, positive, left_out):
    batch = batch_of(query=query, positive=positive)
    exclude = torch.tensor([[(row, other) in left_out for other in range(3)] for row in range(3)])
    terms = Objective(0.05, dims, mask_duplicates=True).terms(embeddings, batch)
    wanted = in_batch_loss(embeddings[batch["query"]], embeddings[batch["positive"]], dims=dims, exclude=exclude)
    assert terms["in_batch"].item() == wanted.item()
    plain = Objective(0.05, dims).terms(embeddings, batch)
    assert terms["hard"].item() == plain["hard"].item()
    if left_out:
        assert terms["in_batch"].item() < plain["in_batch"].item()


def test_rows_that_are_all_duplicates_have_no_in_batch_loss_and_no_nan(embeddings):
    batch = batch_of(query=[0, 0, 0], positive=[1, 1, 1])
    term = Objective(mask_duplicates=True).terms(embeddings, batch)["in_batch"]
    assert term.item() == 0
    term.backward()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("dims", [None, DIMS])
def test_without_gathered_gradients_positives_learn_from_their_hard_negatives_only(embeddings, dims):
    def gradients(**keys):
        terms = Objective(dims=dims, **keys).terms(embeddings, batch)
        return {name: torch.autograd.grad(term, embeddings, retain_graph=True)[0] for name, term in terms.items()}

    # No text is query and positive of the same batch here.
    batch = batch_of()
    full, published = gradients(), gradients(gather_gradients=False)
    assert full["in_batch"][batch["positive"]].abs().min() > 0
    assert not published["in_batch"][batch["positive"]].any()
    assert torch.equal(published["in_batch"][batch["query"]], full["in_batch"][batch["query"]])
    assert torch.equal(published["hard"], full["hard"])


@pytest.fixture
def teacher():
    """Twice as wide as the student."""
    return torch.randn(9, 2 * WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("task_type", ["retrieval", "clustering", "classification"])
def test_distillation_is_the_squared_distance_of_each_role(embeddings, teacher, task_type):
    batch = batch_of(task_type)
    plain = Objective(dims=DIMS).terms(embeddings, batch)
    terms = Objective(dims=DIMS, distillation_weight=0.5).terms(embeddings, batch, teacher)
    distances = (embeddings - teacher[:, :WIDTH]).square()
    wanted = 0.5 * sum(distances[batch[role]].mean() for role in ("query", "positive", "negatives"))
    torch.testing.assert_close(terms.pop("distillation"), wanted)
    assert {name: term.item() for name, term in terms.items()} == {name: term.item() for name, term in plain.items()}


def test_rows_without_negatives_have_no_hard_loss(embeddings, teacher):
    batch = batch_of() | {"negatives": torch.empty(3, 0).long()}
    terms = Objective().terms(embeddings, batch, teacher)
    assert terms["hard"].item() == 0 < terms["in_batch"].item()
    distances = (embeddings - teacher[:, :WIDTH]).square()
    wanted = distances[batch["query"]].mean() + distances[batch["positive"]].mean()
    torch.testing.assert_close(terms["distillation"], wanted)
    sum(terms.values()).backward()
    # Nothing flows into the teacher.
    assert teacher.grad is None and embeddings.grad.isfinite().all() and embeddings.grad.any()
