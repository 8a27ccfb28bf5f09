"""Labelled text: a text of the same class, negatives of others, and draws that only the seed changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from babel import Locale

from training.common.keyed import keyed_bits
from training.data.building.formats.labelled import distinct_below

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    """The German names of languages, territories, scripts and currencies, by Unicode CLDR; some are of two kinds."""
    locale = Locale("de")
    texts, labels = [], []
    for kind in ("languages", "territories", "scripts", "currencies"):
        found = list(getattr(locale, kind).values())
        texts += found
        labels += [kind] * len(found)
    return {"text": texts, "label": labels}


def test_every_text_gets_its_class_and_others(build: Callable[..., Any], names: dict[str, list[str]]) -> None:
    rows, dropped = build("labelled", names)
    classes: dict[str, set[str]] = {}
    for text, label in zip(*names.values(), strict=True):
        classes.setdefault(text, set()).add(label)
    assert [row.query for row in rows] == [text for text, labels in classes.items() if len(labels) == 1]
    for row in rows:
        assert row.passage != row.query
        assert classes[row.passage] == classes[row.query]
        assert len(set(row.negatives)) == 24
        assert all(len(classes[text]) == 1 and classes[text] != classes[row.query] for text in row.negatives)
    assert sum(dropped.values()) == len(names["text"]) - len(rows)
    assert dropped["text has several labels"] > 0


def test_draws_reach_all_texts_alike(build: Callable[..., Any], names: dict[str, list[str]]) -> None:
    rows, _ = build("labelled", names)
    drawn = Counter(text for row in rows for text in row.negatives)
    assert len(drawn) == len(rows)
    assert max(drawn.values()) < 6 * 24


def test_only_the_seed_changes_the_draws(build: Callable[..., Any], names: dict[str, list[str]]) -> None:
    rows, _ = build("labelled", names, seed=3)
    assert build("labelled", names, seed=3)[0] == rows
    others, _ = build("labelled", names, seed=4)
    assert [row.query for row in others] == [row.query for row in rows]
    same = sum(row.passage == other.passage for row, other in zip(rows, others, strict=True))
    assert same < len(rows) / 20


def test_class_of_one_text_has_no_row_but_serves_as_negative(build: Callable[..., Any]) -> None:
    data = {"text": ["a", "b", "c", "d", "e"], "label": [7, 7, "7", "8", 9.0]}
    data["label"] = [str(label) for label in data["label"]]
    rows, dropped = build("labelled", data, num_negatives=2)
    assert [row.query for row in rows] == ["a", "b", "c"]
    assert {*rows[0].negatives} == {"d", "e"}
    assert dropped == {"class has no other text": 2}


def test_what_is_dropped_is_counted(build: Callable[..., Any]) -> None:
    data = {
        "text": ["a", "a", "b", "c", "x", "x", "x", "d", "e", None, "", "f"],
        "label": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, None],
        "lang": ["v"] * 12,
    }
    rows, dropped = build("labelled", data, num_negatives=3)
    assert [row.query for row in rows] == ["d", "e"]
    assert {row.lang for row in rows} == {"v"}
    assert dropped == {
        "text is repeated": 1,
        "text has several labels": 3,
        "text is missing": 1,
        "text is blank": 1,
        "label is missing": 1,
        "other classes have fewer than 3 texts": 3,
    }


@pytest.mark.parametrize("data", [{"text": ["a", "b"], "label": [0, 0]}, {"text": [None], "label": [1]}])
def test_nothing_to_draw_from(build: Callable[..., Any], data: dict[str, list[Any]]) -> None:
    rows, dropped = build("labelled", data)
    assert rows == []
    assert sum(dropped.values()) == len(data["text"])


def test_label_that_is_none(build: Callable[..., Any], refuses: Refuses) -> None:
    with refuses("source 'some'", "row 0,", "'label'", "neither text nor number"):
        build("labelled", {"text": ["a"], "label": [["x", "y"]]})


def test_distinct_below_makes_every_choice_as_likely() -> None:
    keys = keyed_bits(0, np.arange(24_000))
    drawn = distinct_below(keys, np.full(len(keys), 4), 3)
    counts = Counter(map(tuple, drawn.tolist()))
    # 24 ordered choices of 3 out of 4; five standard deviations of a count are 155.
    assert len(counts) == 24
    assert all(abs(count - 1000) < 155 for count in counts.values())


def test_distinct_below_keeps_to_each_bound() -> None:
    bounds = np.arange(5, 1005)
    drawn = distinct_below(keyed_bits(0, bounds), bounds, 5)
    assert (drawn >= 0).all()
    assert (drawn < bounds[:, None]).all()
    assert all(len({*row}) == 5 for row in drawn.tolist())
    assert sorted(drawn[0].tolist()) == [0, 1, 2, 3, 4]
    assert (drawn[10:20] == distinct_below(keyed_bits(0, bounds[10:20]), bounds[10:20], 5)).all()


def test_another_spelling_is_no_other_text(build: Callable[..., Any]) -> None:
    texts = ["Rhine", "rhine.", "Danube", "Bonn", "BONN ", "Vienna"]
    labels = ["river", "river", "river", "town", "river", "town"]
    rows, dropped = build("labelled", {"text": [*texts, "Graz"], "label": [*labels, "town"]}, num_negatives=2)
    # "Bonn" is called both, and so is of neither class.
    assert {row.query for row in rows} == {"Rhine", "Danube", "Vienna", "Graz"}
    assert dropped == {"text is repeated": 1, "text has several labels": 2}
