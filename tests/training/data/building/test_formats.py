"""Formats of raw data: which rows each of them yields, what it counts as dropped, and what it refuses."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from babel import Locale
from datasets import Dataset

from training.common.keyed import keyed_bits
from training.data.building.examples import RawRows
from training.data.building.formats import FORMATS, Row, distinct_below
from training.data.building.reader import from_dataset

NUMBERS = {0: "entailment", 1: "neutral", 2: "contradiction"}
TEXTS = {0: "a language", 1: "a territory"}


def build(name, data, seed=0, **keys):
    """Return the rows of a format and what was dropped; columns are named as roles."""
    kind = FORMATS[name]
    roles = {"texts": kind.texts, "values": kind.values, "optional": kind.optional}
    given = from_dataset(Dataset.from_dict(data)), {role: role for role in data}, "build.yaml: source 'some'"
    raw = RawRows(*given, **roles, name="some", seed=seed)
    rows = list(kind.rows(raw, **{name: key.default for name, key in kind.keys.items()} | keys))
    return rows, {reason: count for reason, count in raw.dropped.items() if count}


def nli(*rows):
    return dict(zip(("premise", "hypothesis", "label", "lang"), map(list, zip(*rows, strict=True)), strict=False))


def scored(*scores):
    numbers = range(len(scores))
    return {"query": [f"q{n}" for n in numbers], "passage": [f"p{n}" for n in numbers], "score": list(scores)}


def test_directions_and_languages_of_pairs_and_what_is_dropped():
    data = {"query": ["Japan"], "passage": ["일본"], "lang": ["eng"], "passage_lang": ["kor"]}
    both = [Row("Japan", "일본", lang="eng"), Row("일본", "Japan", lang="kor")]
    assert build("pairs", data) == (both[:1], {})
    assert build("pairs", data, both_directions=True) == (both, {})
    assert build("duplicates", data, both_directions=True) == (both, {})
    del data["passage_lang"]
    assert [row.lang for row in build("pairs", data, both_directions=True)[0]] == ["eng", "eng"]
    # A summary is the query of its article.
    data = {"article": ["long", "same"], "summary": ["short", "same"], "lang": ["a", "b"]}
    assert build("summaries", data) == ([Row("short", "long", lang="a")], {"query and passage are identical": 1})
    # What is dropped is counted.
    data = {"query": ["a", None, "", "b", "c", " d"], "passage": ["A", "B", "C", None, " \n", "d "], "lang": [None] * 6}
    reasons = ["query is missing", "query is blank", "passage is missing", "passage is blank"]
    dropped = dict.fromkeys([*reasons, "query and passage are identical"], 1)
    assert build("pairs", data) == ([Row("a", "A")], dropped)


@pytest.mark.parametrize(
    ("labels", "duplicate_label"),
    [
        ([1, 0, None], 1),
        (["1.0", "0.0", ""], 1),
        (["True", "false", ""], True),
        ([True, False, None], 1),
        (["y", "n", ""], "y"),
    ],
)
def test_only_pairs_with_the_label_are_duplicates(labels, duplicate_label):
    data = {"query": ["a", "c", "e"], "passage": ["b", "d", "f"], "label": labels}
    rows, dropped = build("duplicates", data, duplicate_label=duplicate_label)
    assert [row[:2] for row in rows] == [("a", "b")]
    assert dropped == {f"label is not {duplicate_label}": 2}


def test_groups_of_duplicates():
    groups = [["a", "b", "c"], ["d"], ["e", "e", None, " "], None, [], ["f", "a"]]
    rows, dropped = build("duplicate_groups", {"group": groups, "lang": list("uvwxyz")})
    assert [(row.query, row.passage, row.lang) for row in rows] == [("a", "b", "u"), ("b", "c", "u"), ("f", "a", "z")]
    assert dropped == {"group has fewer than two different texts": 3, "group is missing": 1}
    rows, _ = build("duplicate_groups", {"group": groups[:1]}, both_directions=True)
    assert [row[:2] for row in rows] == [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]


@pytest.mark.parametrize(
    ("scale", "threshold", "scores", "kept"),
    [
        ([0, 5], 4, [5, 3.99, 4, 0], [0, 2]),
        ([0, 1], 4, [0.79, float(np.float32(0.8)), 1.0], [1, 2]),
        ([4, 1], 4, [1.0, 1.5, 3.0], [0, 1]),  # 1 is the most similar
        ([0, 5], 0, [0.0, 1.0, 2.0], [0, 1, 2]),
        ([0, 5], 3, ["2.9", "3.0", "5"], [1, 2]),  # as csv files have them
    ],
)
def test_similar_pairs_in_both_directions(scale, threshold, scores, kept):
    rows, dropped = build("sts", scored(*scores), scale=scale, threshold=threshold)
    pairs = [((f"q{number}", f"p{number}"), (f"p{number}", f"q{number}")) for number in kept]
    assert [row[:2] for row in rows] == [pair for both in pairs for pair in both]
    assert sum(dropped.values()) == len(scores) - len(kept)


def test_contradictions_then_neutrals_are_the_first_negatives():
    pairs = [("n1", 1), ("e1", 0), ("c1", 2), ("e2", 0), ("n2", 1), ("c2", 2)]
    rows = [("p", *pair, "eng") for pair in pairs]
    # The same premise in another language is another one.
    data = nli(*rows, ("p", "e3", 0, "pol"))
    negatives = ["c1", "c2", "n1", "n2"]
    expected = [*(Row("p", text, negatives, "eng") for text in ("e1", "e2")), Row("p", "e3", [], "pol")]
    assert build("nli", data, labels=NUMBERS) == (expected, {})
    assert build("nli", data, labels=NUMBERS, num_negatives=3)[0][0].negatives == negatives[:3]


def test_dropped_nli_rows_are_counted():
    data = nli(
        ("p", "e", 0),
        ("p", "e", 0),  # repeated
        ("p", "p", 0),  # says nothing
        ("p", "e", 2),  # annotators disagree
        ("p", "E.", 2),  # in another spelling
        ("p", "c", 2),
        ("p", "x", -1),
        ("p", "x", 7),
        ("p", "x", None),
        ("p", " ", 1),
        (None, "x", 1),
        ("alone", "c", 2),
    )
    rows, dropped = build("nli", data, labels={**NUMBERS, 7: None})
    assert rows == [Row("p", "e", ["c"])]
    assert dropped == {
        "row is repeated": 1,
        "query and passage are identical": 1,
        "hypothesis is labelled entailed, or is the premise, and cannot be a negative": 2,
        "label is -1": 1,
        "label is 7": 1,
        "label is missing": 1,
        "hypothesis is blank": 1,
        "premise is missing": 1,
        "premise entails no hypothesis": 1,
    }


def test_two_way_texts_against_the_other_label():
    data = {"text": list("abcde"), "label": [1, -1, None, 2, 0], "lang": list("vwxyz")}
    rows, dropped = build("two_way", data, label_texts={**TEXTS, 2: None})
    assert rows == [Row("a", TEXTS[1], (TEXTS[0],), "v"), Row("e", TEXTS[0], (TEXTS[1],), "z")]
    assert dropped == {"label is -1": 1, "label is missing": 1, "label is 2": 1}
    shared = {1: "bad", 2: "bad", 4: "good", 5: "good"}
    rows, _ = build("two_way", {"text": ["a", "b"], "label": [1, 5]}, label_texts=shared)
    assert [row.passage for row in rows] == ["bad", "good"]


def test_every_labelled_text_gets_its_class_and_others():
    # The German names in CLDR; some are of two kinds.
    kinds = ("languages", "territories", "scripts", "currencies")
    pairs = [(name, kind) for kind in kinds for name in getattr(Locale("de"), kind).values()]
    names = {"text": [name for name, _ in pairs], "label": [kind for _, kind in pairs]}
    rows, dropped = build("labelled", names)
    classes = defaultdict(set)
    for text, label in pairs:
        classes[text].add(label)
    assert [row.query for row in rows] == [text for text, labels in classes.items() if len(labels) == 1]
    for row in rows:
        assert row.passage != row.query
        assert classes[row.passage] == classes[row.query]
        assert len(set(row.negatives)) == 24
        assert all(len(classes[text]) == 1 and classes[text] != classes[row.query] for text in row.negatives)
    assert sum(dropped.values()) == len(pairs) - len(rows)
    assert dropped["text has several labels"] > 0
    drawn = Counter(text for row in rows for text in row.negatives)
    assert len(drawn) == len(rows) and max(drawn.values()) < 6 * 24
    # Only the seed changes the draws.
    assert build("labelled", names)[0] == rows
    others, _ = build("labelled", names, seed=4)
    assert [row.query for row in others] == [row.query for row in rows]
    assert sum(row.passage == other.passage for row, other in zip(rows, others, strict=True)) < len(rows) / 20


def test_dropped_labelled_texts_are_counted():
    data = {
        "text": ["a", "A.", "b", "c", "x", "x", "x", "d", "e", "g", None, "", "f"],
        "label": [*"00000111", "1.0", *"211", None],
        "lang": ["v"] * 13,
    }
    rows, dropped = build("labelled", data, num_negatives=4)
    assert [row.query for row in rows] == ["d", "e"]
    assert {row.lang for row in rows} == {"v"}
    # The only text of its class has no row, but serves as a negative.
    assert all({*row.negatives} == {"a", "b", "c", "g"} for row in rows)
    assert dropped == {
        "text is repeated": 1,
        "text has several labels": 3,
        "text is missing": 1,
        "text is blank": 1,
        "label is missing": 1,
        "class has no other text": 1,
        "other classes have fewer than 4 texts": 3,
    }


def test_distinct_below_makes_every_choice_equally_likely():
    keys = keyed_bits(0, np.arange(24_000))
    counts = Counter(map(tuple, distinct_below(keys, np.full(len(keys), 4), 3).tolist()))
    # 24 ordered choices of 3 out of 4; five standard deviations of a count are 155.
    assert len(counts) == 24
    assert all(abs(count - 1000) < 155 for count in counts.values())


@pytest.mark.parametrize(
    ("name", "data", "keys", "parts"),
    [
        ("pairs", {"query": ["q"] * 1001, "passage": [None] * 1000 + [7]}, {}, ("row 1000,", "'passage'", "not text")),
        ("pairs", {"query": ["q"], "passage": ["p"], "lang": [3]}, {}, ("row 0,", "'lang'", "not text")),
        ("nli", nli(("p", "e", 3)), {"labels": NUMBERS}, ("'label'", "3", "'labels'")),
        ("sts", scored("four"), {}, ("row 0,", "'score'", "not a number")),
        *(("sts", scored(score), {}, ("row 0,", "'score'", "off the scale")) for score in (5.1, float("nan"))),
        ("duplicate_groups", {"group": [[1, 2]]}, {}, ("row 0,", "'group'", "not a list of texts")),
        ("labelled", {"text": ["a"], "label": [["x", "y"]]}, {}, ("row 0,", "'label'", "neither text nor number")),
        ("two_way", {"text": ["a", "b"], "label": [1, 2]}, {"label_texts": TEXTS}, ("row 1,", "unknown label 2")),
    ],
)
def test_faulty_values_are_refused(refuses, name, data, keys, parts):
    with refuses("build.yaml: source 'some'", *parts):
        build(name, data, **keys)


@pytest.mark.parametrize(
    ("name", "key", "good", "bad"),
    [
        ("sts", "scale", [1, 4], [5, [0], [1, 1], [0, "5"], [0, 1, 2]]),
        ("nli", "labels", NUMBERS, [{}, "x", {0: "neutral"}, {0: "entailment", 1: "entails"}]),
        ("two_way", "label_texts", {**TEXTS, -1: None}, [{}, {0: "Yes", 1: "yes."}, {0: "a", 1: 2}, {0: "a", 1: " "}]),
    ],
)
def test_values_of_keys(name, key, good, bad):
    assert FORMATS[name].keys[key].fits(good)
    assert not any(FORMATS[name].keys[key].fits(value) for value in bad)
