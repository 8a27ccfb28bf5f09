from __future__ import annotations

import pytest

from training.models.merging.method import mean_of, slerp_of


def test_weights_sum_to_one():
    assert mean_of(4).shares == (0.25, 0.25, 0.25, 0.25)
    assert mean_of(2, [3, 1]).shares == (0.75, 0.25)
    assert slerp_of(2, 0.25).shares == (0.75, 0.25)


@pytest.mark.parametrize(
    ("weights", "part"),
    [
        ([0.5], "1 weights for 2 models"),
        ([0.5, 0.3, 0.2], "3 weights for 2 models"),
        ([1.0, -1.0], "-1.0 is not a positive number"),
        ([0.0, 0.0], "0.0 is not a positive number"),
        ([1.0, float("nan")], "nan is not a positive number"),
        ([1.0, float("inf")], "inf is not a positive number"),
    ],
)
def test_faulty_weights_are_refused(refuses, weights, part):
    with refuses("--weights", part):
        mean_of(2, weights)


@pytest.mark.parametrize(("models", "t", "part"), [(3, 0.5, "not 3"), (1, 0.5, "not 1"), (2, 1.5, "1.5")])
def test_slerp_is_between_two_models(refuses, models, t, part):
    with refuses("--slerp", part):
        slerp_of(models, t)
