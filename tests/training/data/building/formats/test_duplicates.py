"""Duplicates, in labelled pairs and in groups."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from training.data.building.formats import FORMATS

Refuses = Callable[..., AbstractContextManager[None]]


def test_all_pairs_of_a_set_without_labels(build: Callable[..., Any]) -> None:
    rows, dropped = build("duplicates", {"query": ["a", "c", "e"], "passage": ["b", "d", "e"]})
    assert [row[:2] for row in rows] == [("a", "b"), ("c", "d")]
    assert dropped == {"query and passage are identical": 1}
    assert FORMATS["duplicates"].symmetric
    assert FORMATS["duplicate_groups"].symmetric


@pytest.mark.parametrize(
    ("labels", "duplicate_label"),
    [
        ([1, 0, None], 1),
        ([1.0, 0.0, None], 1),
        (["1", "0", None], 1),
        (["1.0", "0.0", ""], 1),
        (["True", "false", ""], True),
        ([True, False, None], 1),
        (["y", "n", ""], "y"),
    ],
)
def test_only_what_is_labelled_so(build: Callable[..., Any], labels: list[Any], duplicate_label: Any) -> None:
    data = {"query": ["a", "c", "e"], "passage": ["b", "d", "f"], "label": labels}
    rows, dropped = build("duplicates", data, duplicate_label=duplicate_label)
    assert [row[:2] for row in rows] == [("a", "b")]
    assert dropped == {f"label is not {duplicate_label}": 2}


def test_both_directions(build: Callable[..., Any]) -> None:
    rows, _ = build("duplicates", {"query": ["a"], "passage": ["b"]}, both_directions=True)
    assert [row[:2] for row in rows] == [("a", "b"), ("b", "a")]


def test_groups(build: Callable[..., Any]) -> None:
    groups = [["a", "b", "c"], ["d"], ["e", "e", None, " "], None, [], ["f", "a"]]
    rows, dropped = build("duplicate_groups", {"group": groups, "lang": list("uvwxyz")})
    assert [(row.query, row.passage, row.lang) for row in rows] == [("a", "b", "u"), ("b", "c", "u"), ("f", "a", "z")]
    assert dropped == {"group has fewer than two different texts": 3, "group is missing": 1}
    rows, _ = build("duplicate_groups", {"group": groups[:1]}, both_directions=True)
    assert [row[:2] for row in rows] == [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]


@pytest.mark.parametrize("group", ["a b", [1, 2], [["a"]]])
def test_group_that_is_none(build: Callable[..., Any], refuses: Refuses, group: Any) -> None:
    with refuses("source 'some'", "row 0,", "'group'", "not a list of texts"):
        build("duplicate_groups", {"group": [group]})
