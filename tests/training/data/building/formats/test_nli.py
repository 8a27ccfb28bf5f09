"""Natural language inference: which hypotheses a premise looks for, and which are its negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from training.data.building.formats.format import Row
from training.data.building.formats.nli import NLI

Refuses = Callable[..., AbstractContextManager[None]]
NUMBERS = {0: "entailment", 1: "neutral", 2: "contradiction"}


def columns(rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return dict(zip(("premise", "hypothesis", "label", "lang"), map(list, zip(*rows, strict=True)), strict=False))


def test_contradictions_then_neutrals_are_the_first_negatives(build: Callable[..., Any]) -> None:
    data = columns(
        [
            ("p", "n1", 1),
            ("p", "e1", 0),
            ("other", "e", 0),
            ("p", "c1", 2),
            ("p", "e2", 0),
            ("p", "n2", 1),
            ("p", "c2", 2),
        ]
    )
    rows, dropped = build("nli", data, labels=NUMBERS)
    negatives = ["c1", "c2", "n1", "n2"]
    assert rows == [Row("p", "e1", negatives), Row("p", "e2", negatives), Row("other", "e", [])]
    assert dropped == {}
    rows, _ = build("nli", data, labels=NUMBERS, num_negatives=3)
    assert rows[0].negatives == negatives[:3]


def test_labels_in_words_need_no_mapping(build: Callable[..., Any]) -> None:
    data = columns([("p", "e", "entailment"), ("p", "n", "neutral"), ("p", "c", "contradiction")])
    assert build("nli", data)[0] == [Row("p", "e", ["c", "n"])]


def test_premise_in_another_language_is_another(build: Callable[..., Any]) -> None:
    data = columns([("Pan", "e", 0, "eng"), ("Pan", "c", 2, "pol"), ("Pan", "f", 0, "pol")])
    rows, _ = build("nli", data, labels=NUMBERS)
    assert rows == [Row("Pan", "e", [], "eng"), Row("Pan", "f", ["c"], "pol")]


def test_what_is_dropped_is_counted(build: Callable[..., Any]) -> None:
    data = columns(
        [
            ("p", "e", 0),
            ("p", "e", 0),  # repeated
            ("p", "p", 0),  # says nothing
            ("p", "e", 2),  # annotators disagree
            ("p", "c", 2),
            ("p", "x", -1),
            ("p", "x", None),
            ("p", " ", 1),
            (None, "x", 1),
            ("alone", "c", 2),
        ]
    )
    rows, dropped = build("nli", data, labels=NUMBERS)
    assert rows == [Row("p", "e", ["c"])]
    assert dropped == {
        "row is repeated": 1,
        "query and passage are identical": 1,
        "hypothesis is labelled entailed, or is the premise, and can be no negative": 1,
        "label is -1": 1,
        "label is missing": 1,
        "hypothesis is blank": 1,
        "premise is missing": 1,
        "premise entails no hypothesis": 1,
    }


def test_label_to_leave_out(build: Callable[..., Any]) -> None:
    data = columns([("p", "e", "yes"), ("p", "x", "-"), ("p", "n", "no")])
    rows, dropped = build("nli", data, labels={"yes": "entailment", "no": "neutral", "-": None})
    assert rows == [Row("p", "e", ["n"])]
    assert dropped == {"label is -": 1}


# CSV columns with gaps are of floats, and JSON may quote.
@pytest.mark.parametrize("label", [0, 0.0, "0", False])
def test_label_is_the_same_in_every_file(build: Callable[..., Any], label: Any) -> None:
    assert build("nli", columns([("p", "e", label)]), labels=NUMBERS)[0] == [Row("p", "e", [])]


@pytest.mark.parametrize("label", [3, "entails", 0.5, [0]])
def test_unknown_label(build: Callable[..., Any], refuses: Refuses, label: Any) -> None:
    with refuses("source 'some'", "row 0,", "'label'", repr(label), "'labels'"):
        build("nli", columns([("p", "e", label)]), labels=NUMBERS)


@pytest.mark.parametrize(
    "labels", [{}, [], "entailment", {0: "neutral"}, {0: "entailment", 1: "entails"}, {0: "entailment", 1: ["neutral"]}]
)
def test_labels_that_mean_nothing(labels: Any) -> None:
    assert not NLI.keys["labels"].fits(labels)
    assert NLI.keys["labels"].fits(NUMBERS)


def test_another_spelling_of_what_is_entailed_or_of_the_premise_is_no_negative(build: Callable[..., Any]) -> None:
    data = columns([("A cat sits.", "It sits.", 0), ("A cat sits.", "it sits", 2), ("A cat sits.", "a CAT sits!", 1)])
    rows, dropped = build("nli", data, labels=NUMBERS)
    assert rows == [Row("A cat sits.", "It sits.", [])]
    assert sum(dropped.values()) == 2
