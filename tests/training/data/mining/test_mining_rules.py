"""Each rule by hand, in the order in which candidates meet them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import pytest

from training.data.mining.index import Nearest
from training.data.mining.rules import RULES, MiningOptions, Relations, choose_negatives

# One query, passages 0, 1, … with these scores; passage 1 is the positive.
SCORES = [0.95, 0.9, 0.86, 0.82, 0.79, 0.7, 0.6, 0.5, 0.4]
OPEN = MiningOptions(top=9, skip=0, max_score=1.01, relative=2.0, negatives=9)


def choose(
    options: MiningOptions, scores: list[float] = SCORES, **relations: object
) -> tuple[list[int], dict[str, int]]:
    """The negatives of the query, and the counts that are not zero."""
    nearest = Nearest(np.array([scores], dtype=np.float32), np.arange(len(scores))[None])
    positives = np.array(relations.pop("positives", [1]))
    known = Relations(
        form=np.array([relations.pop("form", -1)]),
        group=np.array([relations.pop("group", -1)]),
        positive_query=np.zeros(len(positives), dtype=np.int64),
        positive=positives,
        positive_score=nearest.scores[0, positives],
        passage_group=np.array(relations.pop("passage_group", [-1] * len(scores))),
        passage_form=np.array(relations.pop("passage_form", range(len(scores)))),
    )
    negatives, counts = choose_negatives(nearest, known, options)
    assert not relations and list(counts) == list(RULES)
    return [number for number in negatives[0].tolist() if number >= 0], {k: n for k, n in counts.items() if n}


def test_only_the_positive_is_refused_without_limits() -> None:
    assert choose(OPEN) == ([0, 2, 3, 4, 5, 6, 7, 8], {"positive": 1})


def test_all_positives_of_a_query_are_refused() -> None:
    assert choose(OPEN, positives=[1, 4]) == ([0, 2, 3, 5, 6, 7, 8], {"positive": 2})


def test_the_query_itself_is_refused() -> None:
    assert choose(OPEN, form=0) == ([2, 3, 4, 5, 6, 7, 8], {"positive": 1, "same_text": 1})


def test_other_spellings_of_positive_and_query_are_refused() -> None:
    # 0 and 4 are spellings of the positive, 2 one of the query.
    forms = [1, 1, 9, 3, 1, 5, 6, 7, 8]
    assert choose(OPEN, passage_form=forms, form=9) == ([3, 5, 6, 7, 8], {"positive": 3, "same_text": 1})


def test_of_several_spellings_the_nearest_is_kept() -> None:
    assert choose(OPEN, passage_form=[0, 1, 2, 0, 2, 5, 6, 2, 8]) == (
        [0, 2, 5, 6, 8],
        {"positive": 1, "repeated": 3},
    )


def test_max_score() -> None:
    assert choose(replace(OPEN, max_score=0.8)) == ([4, 5, 6, 7, 8], {"positive": 1, "score": 3})
    # As published: lower, not as low.
    assert choose(replace(OPEN, max_score=0.79))[0] == [5, 6, 7, 8]


def test_relative_to_the_positive() -> None:
    # 0.95 * 0.9 = 0.855
    assert choose(replace(OPEN, relative=0.95)) == ([3, 4, 5, 6, 7, 8], {"positive": 1, "relative": 2})


def test_relative_to_the_lowest_positive() -> None:
    # 0.95 * 0.6 = 0.57
    assert choose(replace(OPEN, relative=0.95), positives=[1, 6]) == ([7, 8], {"positive": 2, "relative": 5})


def test_relative_to_a_negative_score() -> None:
    # 5 % of 0.4 below -0.4 is -0.42; 0.95 times -0.4 would be above it.
    scores = [0.1, -0.4, -0.41, -0.43]
    assert choose(replace(OPEN, relative=0.95), scores) == ([3], {"positive": 1, "relative": 2})


def test_translations_of_positive_and_query_are_refused() -> None:
    groups = [7, 3, -1, 3, 7, 5, -1, 5, 3]
    assert choose(OPEN, passage_group=groups) == ([0, 2, 4, 5, 6, 7], {"positive": 1, "translation": 2})
    assert choose(OPEN, passage_group=groups, group=7) == ([2, 5, 6, 7], {"positive": 1, "translation": 4})
    # Texts outside all groups are not one group.
    assert choose(OPEN, passage_group=[-1] * 9, group=-1)[1] == {"positive": 1}


def test_skip_counts_what_is_left() -> None:
    options = replace(OPEN, max_score=0.8, relative=0.95, skip=2, negatives=2)
    assert choose(options) == ([6, 7], {"positive": 1, "score": 3})
    assert choose(replace(options, negatives=1))[0] == [6]


def test_queries_do_not_mix() -> None:
    nearest = Nearest(np.array([[0.9, 0.5, 0.4]] * 2, dtype=np.float32), np.array([[0, 1, 2], [1, 0, 2]]))
    relations = Relations(
        form=np.array([-1, -1]),
        group=np.array([-1, 4]),
        positive_query=np.array([0, 1]),
        positive=np.array([0, 1]),
        positive_score=np.array([0.9, 0.9], dtype=np.float32),
        passage_group=np.array([-1, -1, 4]),
        passage_form=np.array([0, 1, 2]),
    )
    negatives, counts = choose_negatives(nearest, relations, replace(OPEN, negatives=2))
    assert negatives.tolist() == [[1, 2], [0, -1]]
    assert counts["positive"] == 2 and counts["translation"] == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"top": 0}, ("top", 0)),
        ({"skip": -1}, ("skip", -1)),
        ({"negatives": 0}, ("negatives", 0)),
        ({"top": 28}, ("top 28", "raise top to 29")),
        ({"max_score": 80}, ("max-score", 80)),
        ({"max_score": float("nan")}, ("max-score", "nan")),
        ({"relative": 0}, ("relative", 0)),
    ],
)
def test_options_out_of_range(
    refuses: Callable[..., AbstractContextManager[None]], options: dict[str, float], parts: tuple[object, ...]
) -> None:
    with refuses(*parts):
        MiningOptions(**options).check()
