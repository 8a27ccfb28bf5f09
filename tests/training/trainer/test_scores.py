"""False negatives and the scores of a teacher: the objective's mask and term by plain loops over rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from modeling_f2llm.losses import score_distillation_loss
from training.trainer.step import Objective

TEXTS, WIDTH = 12, 16
# Text 1 is the positive of two rows; row 2 has one negative.
BATCH = {
    "query": torch.tensor([0, 3, 6, 9]),
    "positive": torch.tensor([1, 4, 5, 1]),
    "negatives": torch.tensor([[2, 7], [8, 2], [10, -1], [11, 5]]),
}


def draw(width=WIDTH, seed=0):
    return torch.randn(TEXTS, width, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def batch_of(task_type="retrieval", **more):
    return {**BATCH, "task_type": task_type, **more}


def looped(embeddings, judge, batch, margin, duplicates=()):
    """The terms, row by row, and how many candidates there are and how many are left out."""
    losses, counts = {"in_batch": [], "hard": []}, [0, 0]
    for row, (query, positive) in enumerate(zip(batch["query"], batch["positive"], strict=True)):
        others = [(row, other) for other in range(4) if other != row and (row, other) not in duplicates]
        texts = {"in_batch": [batch["positive"][other] for _, other in others]}
        texts["hard"] = [text for text in batch["negatives"][row] if text >= 0]
        if batch["task_type"] != "retrieval":
            texts["in_batch"] = []
        limit = cosine_similarity(judge[query], judge[positive], dim=0) + margin
        for name, candidates in texts.items():
            kept = [text for text in candidates if cosine_similarity(judge[query], judge[text], dim=0) <= limit]
            counts[0] += len(candidates)
            counts[1] += len(candidates) - len(kept)
            own = embeddings[torch.stack([positive, *kept])]
            logits = cosine_similarity(embeddings[query], own, dim=-1)
            losses[name].append(-(logits / 0.05).log_softmax(0)[0])
    terms = {name: torch.stack(each).mean() for name, each in losses.items()}
    return ({"hard": terms["hard"]} if batch["task_type"] != "retrieval" else terms), counts


@pytest.mark.parametrize("task_type", ["retrieval", "clustering"])
@pytest.mark.parametrize("margin", [-0.2, 0.0, 0.1])
@pytest.mark.parametrize("by_teacher", [False, True])
def test_false_negatives_are_left_out_of_both_terms(by_teacher, margin, task_type):
    embeddings, batch, noted = draw(), batch_of(task_type), {}
    teacher = draw(2 * WIDTH, 1) if by_teacher else None
    objective = Objective(mask_false_negatives=margin, distillation_weight=0.0)
    terms = objective.terms(embeddings, batch, teacher, noted=noted)
    wanted, (candidates, left_out) = looped(embeddings, embeddings if teacher is None else teacher, batch, margin)
    assert list(terms) == list(wanted) and 0 < left_out < candidates
    for name, term in wanted.items():
        torch.testing.assert_close(terms[name], term)
    gradients = [torch.autograd.grad(sum(each.values()), embeddings)[0] for each in (terms, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert noted["masked_candidates"].item() == pytest.approx(left_out / candidates)


def test_the_mask_works_beside_duplicates_and_several_positives():
    # Rows 0 and 3 share their positive; text 4, the positive of row 1, is one of row 2's own.
    own_forms = torch.tensor([[1, 1], [4, 4], [5, 4], [1, 1]])
    embeddings, noted, pairs = draw(), {}, {(0, 3), (3, 0), (2, 1)}
    batch = batch_of(forms=torch.arange(TEXTS), own_forms=own_forms)
    objective = Objective(mask_false_negatives=0.0, mask_duplicates=True)
    terms = objective.terms(embeddings, batch, noted=noted)
    wanted, (candidates, left_out) = looped(embeddings, embeddings, batch, 0.0, pairs)
    torch.testing.assert_close(terms, wanted)
    # What is left out anyway is no candidate.
    assert noted["masked_candidates"].item() == pytest.approx(left_out / candidates)


def test_rows_all_of_whose_candidates_are_false_teach_nothing():
    embeddings, noted = draw(), {}
    # Every text but the positives is nearer to every query.
    judge = torch.ones(TEXTS, 2)
    judge[BATCH["positive"], 1] = torch.tensor([-1.0, -2.0, -3.0, -1.0])
    batch = batch_of("clustering", negatives=torch.tensor([[2, 7], [8, 2], [10, -1], [11, 7]]))
    objective = Objective(mask_false_negatives=0.1, distillation_weight=0.0)
    terms = objective.terms(embeddings, batch, judge, noted=noted)
    (gradient,) = torch.autograd.grad(terms["hard"], embeddings)
    assert (terms["hard"].item(), noted["masked_candidates"].item(), gradient.count_nonzero().item()) == (0, 1, 0)


def test_graded_pairs_have_no_false_negatives():
    noted = {}
    batch = batch_of("similarity", negatives=torch.empty(4, 0).long(), scores=torch.arange(4.0))
    terms = [Objective(mask_false_negatives=each).terms(draw(), batch, noted=noted) for each in (None, 0.0)]
    assert terms[0] == terms[1] and not noted


@pytest.mark.parametrize("task_type", ["retrieval", "classification", "similarity"])
@pytest.mark.parametrize("width", [WIDTH // 2, 3 * WIDTH])
def test_the_scores_of_a_teacher_of_any_width_teach_every_task(task_type, width):
    embeddings, teacher, dims = draw(), draw(width, 1), [16, 8]
    batch = batch_of(task_type, scores=torch.arange(4.0))
    keys = {"distillation_weight": 0.0, "score_distillation_weight": 0.5, "teacher_temperature": 0.2}
    terms = Objective(0.1, dims, **keys).terms(embeddings, batch, teacher)
    plain = Objective(0.1, dims).terms(embeddings, batch)
    assert list(terms) == [*plain, "score_distillation"]
    assert all(terms[name].item() == term.item() for name, term in plain.items())
    wanted = 0.0
    for row, query in enumerate(batch["query"]):
        own = [batch["positive"][row], *(text for text in batch["negatives"][row] if text >= 0)]
        for candidates in (batch["positive"], torch.stack(own)):
            scores = cosine_similarity(teacher[query], teacher[candidates], dim=-1) / 0.2
            of_row = (embeddings[query][None], embeddings[candidates], scores[None])
            wanted += 0.5 * score_distillation_loss(*of_row, temperature=0.1, dims=dims) / 4
    torch.testing.assert_close(terms["score_distillation"], wanted)
    terms["score_distillation"].backward()
    # Nothing flows into the teacher.
    assert teacher.grad is None and embeddings.grad.any()


def test_scores_of_the_data_teach_the_rows_that_have_them():
    embeddings, nan = draw(), float("nan")
    scores = torch.tensor([[2.0, 1.0, nan], [nan, 3.0, nan], [0.5, -1.0, nan], [1.0, 0.0, 4.0]])
    negatives = torch.tensor([[2, 7], [8, 2], [10, -1], [11, 5]])
    batch = batch_of(negatives=negatives, candidate_scores=scores)
    keys = {"score_distillation_weight": 0.5, "teacher_temperature": 2.0}
    term = Objective(0.1, **keys).terms(embeddings, batch)["score_distillation"]
    wanted = 0.0
    for row, known in ((0, [1, 2]), (2, [5, 10]), (3, [1, 11, 5])):
        cosines = cosine_similarity(embeddings[batch["query"][row]], embeddings[known], dim=-1)
        chances = (scores[row, : len(known)] / 2).softmax(0)
        wanted += 0.5 * (chances * (chances.log() - (cosines / 0.1).log_softmax(0))).sum() / 3
    torch.testing.assert_close(term, wanted)
    (gradient,) = torch.autograd.grad(term, embeddings)
    assert gradient.isfinite().all() and not gradient[batch["query"][1]].any()
    # A batch without any adds nothing; without the weight, they are not read.
    none = Objective(**keys).terms(embeddings, {**batch, "candidate_scores": scores * nan})["score_distillation"]
    assert none == 0 and not torch.autograd.grad(none, embeddings)[0].any()
    assert "score_distillation" not in Objective().terms(embeddings, batch)
