"""Which scores are meant where a model was scored at several widths, or models by different tasks."""

from __future__ import annotations

import pytest

from tests.training.evaluation.synthetic import score
from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.selection import by_task, labels, model_scores, shared_scores, task_mean


def test_labels_are_those_with_scores_in_the_order_of_the_models() -> None:
    models = [ModelRecord("b"), ModelRecord("none"), ModelRecord("a", "step-1"), ModelRecord("b")]
    scores = [score(model="unlisted"), score(model="a@step-1"), score(model="b")]
    assert labels(Evaluation(models, scores)) == ["b", "a@step-1", "unlisted"]


def test_the_most_dimensions_of_the_precision_are_meant_if_none_are_named() -> None:
    made = Evaluation(
        scores=[score(dimension=16), score(dimension=64), score(dimension=128, precision="binary"), score(model="x")]
    )
    assert [found.dimension for found in model_scores(made, "small")] == [64]
    assert [found.dimension for found in model_scores(made, "small", precision="binary")] == [128]
    assert [found.dimension for found in model_scores(made, "small", 16)] == [16]


def test_a_task_weighs_the_same_however_many_subsets_it_has() -> None:
    scores = [score(("deu-Latn",), value=0.2), score(("rus-Cyrl",), value=0.4), score(task="Other", value=0.9)]
    assert task_mean(scores) == pytest.approx((0.3 + 0.9) / 2)
    assert task_mean(iter(scores)) == task_mean(scores)


def test_subsets_are_in_order() -> None:
    scores = [score(subset="b"), score(subset="c", split="dev"), score(subset="a"), score(task="Other")]
    found = by_task(scores)
    assert list(found) == ["Names", "Other"]
    assert [(each.split, each.subset) for each in found["Names"]] == [("dev", "c"), ("test", "a"), ("test", "b")]


def test_models_are_compared_by_the_tasks_that_all_have() -> None:
    made = Evaluation(
        scores=[
            *(score(model="a", task=task, value=0.5) for task in ("T1", "T2", "T3")),
            *(score(model="b", task=task, value=0.6) for task in ("T2", "T3", "T4")),
            # Neither another width nor another precision adds a task.
            score(model="a", task="T4", dimension=8),
            score(model="binary", task="T9", precision="binary"),
        ]
    )
    shared = shared_scores(made, ["a", "b", "binary"])
    assert {model: {each.task for each in found} for model, found in shared.items()} == {
        "a": {"T2", "T3"},
        "b": {"T2", "T3"},
    }
    assert {each.task for each in shared_scores(made, ["a"])["a"]} == {"T1", "T2", "T3"}


def test_models_without_a_common_task_share_nothing() -> None:
    made = Evaluation(scores=[score(model="a", task="T1"), score(model="b", task="T2")])
    assert shared_scores(made, ["a", "b"]) == shared_scores(made, []) == {}
