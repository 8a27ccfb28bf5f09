"""Semantic textual similarity: the threshold, scales, and both directions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from training.data.building.formats.sts import STS

Refuses = Callable[..., AbstractContextManager[None]]


def data(scores: list[Any]) -> dict[str, list[Any]]:
    return {
        "query": [f"q{place}" for place in range(len(scores))],
        "passage": [f"p{place}" for place in range(len(scores))],
        "score": scores,
    }


def test_similar_pairs_find_each_other(build: Callable[..., Any]) -> None:
    rows, dropped = build("sts", data([5, 3.99, 4, 0, None]))
    assert [row[:2] for row in rows] == [("q0", "p0"), ("p0", "q0"), ("q2", "p2"), ("p2", "q2")]
    assert dropped == {"score is below the threshold": 2, "score is missing": 1}
    assert STS.symmetric


@pytest.mark.parametrize(
    ("scale", "threshold", "scores", "kept"),
    [
        ([0, 5], 3, [2.9, 3.0, 5.0], [1, 2]),
        ([0, 1], 4, [0.79, float(np.float32(0.8)), 1.0], [1, 2]),
        ([1, 4], 4, [3.0, 3.5, 4.0], [1, 2]),
        ([4, 1], 4, [1.0, 1.5, 3.0], [0, 1]),  # 1 is the most similar
        ([0, 5], 0, [0.0, 1.0, 2.0], [0, 1, 2]),
        ([0, 5], 3, ["2.9", "3.0", "5"], [1, 2]),  # as csv files have them
    ],
)
def test_scales(build: Callable[..., Any], scale: list[int], threshold: int, scores: list, kept: list[int]) -> None:
    rows, _ = build("sts", data(scores), scale=scale, threshold=threshold)
    assert [row.query for row in rows[::2]] == [f"q{place}" for place in kept]


@pytest.mark.parametrize(
    ("score", "fault"),
    [("four", "not a number"), (True, "not a number"), (float("nan"), "not a number"), (5.1, "off the scale")],
)
def test_faulty_score(build: Callable[..., Any], refuses: Refuses, score: Any, fault: str) -> None:
    with refuses("source 'some'", "row 0,", "'score'", fault):
        build("sts", data([score]))


@pytest.mark.parametrize("scale", [5, [0], [1, 1], [0, "5"], [0, 1, 2]])
def test_no_scale(scale: Any) -> None:
    assert not STS.keys["scale"].fits(scale)
