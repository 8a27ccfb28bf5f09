from __future__ import annotations

import random

import pytest

from training.pruning.ranges import as_ranges, from_ranges


def test_any_order_survives():
    rng = random.Random(0)
    for size in (0, 1, 2, 9, 200):
        numbers = rng.sample(range(300), size)
        assert from_ranges(as_ranges(numbers), "here") == tuple(numbers)
        assert from_ranges(as_ranges(sorted(numbers)), "here") == tuple(sorted(numbers))


def test_runs_are_written_short():
    assert as_ranges([0, 1, 2, 3, 5, *range(9, 21)]) == "0-3 5 9-20"
    assert as_ranges([3, 2, 1]) == "3 2 1"


def test_yaml_makes_a_number_of_a_single_one():
    assert from_ranges(5, "here") == (5,)


@pytest.mark.parametrize("text", ["0-3 x", "5-3", "-1", "1.5", "1 - 2", None, [1, 2], True])
def test_what_is_no_range_is_refused(text, refuses):
    with refuses("here", "0-3 5 9-20"):
        from_ranges(text, "here")
