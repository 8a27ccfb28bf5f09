"""A summary's means are those of plain loops over the scores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest

from tests.training.evaluation.synthetic import evaluation, many_languages, score
from training.evaluation.records import Evaluation
from training.evaluation.summary import as_dict, languages_of, summarize

Refuses = Callable[..., AbstractContextManager[None]]

HAND = Evaluation(
    scores=[
        score(("deu-Latn",), 10, value=0.2),
        score(("rus-Cyrl",), 30, value=0.6),
        score(("eng-Latn", "deu-Latn"), 10, task="Pairs", task_type="BitextMining", value=0.4),
        score(("deu-Latn", "rus-Cyrl"), 50, task="Pairs", task_type="BitextMining", value=0.9),
        score(("eng-Latn",), 100, task="Pairs", value=1.0),
    ]
)


def test_languages_scripts_and_classes_by_hand() -> None:
    summary = summarize(HAND, "small", {"deu": 999_000, "rus": 500})
    # German: retrieval 0.2, bitexts (0.4 + 0.9) / 2; Russian: 0.6 and 0.9; English: its own texts alone.
    assert {group.name: group.macro for group in summary.languages} == pytest.approx(
        {"deu-Latn": (0.2 + 0.65) / 2, "rus-Cyrl": 0.75, "eng-Latn": 1.0}
    )
    assert {group.name: group.macro for group in summary.scripts} == pytest.approx(
        {"Latn": (0.425 + 1.0) / 2, "Cyrl": 0.75}
    )
    assert [group.name for group in summary.classes] == ["high", "low", "none"]
    latin = next(group for group in summary.scripts if group.name == "Latn")
    assert (latin.languages, latin.examples) == (2, 170)
    assert latin.micro == pytest.approx((0.2 * 10 + 0.4 * 10 + 0.9 * 50 + 100) / 170)


def test_macro_and_micro_means_by_hand() -> None:
    summary = summarize(HAND, "small")
    assert summary.macro == pytest.approx(((0.2 + 0.6) / 2 + (0.4 + 0.9 + 1.0) / 3) / 2)
    assert summary.micro == pytest.approx((0.2 * 10 + 0.6 * 30 + 0.4 * 10 + 0.9 * 50 + 100) / 200)
    assert summary.language_macro == pytest.approx((0.425 + 0.75 + 1.0) / 3)
    assert summary.classes == []


def test_english_centred_bitext_is_told_from_any_to_any() -> None:
    found = {group.name: group.macro for group in summarize(HAND, "small").bitext}
    assert found == pytest.approx({"English-centred": 0.4, "any-to-any": 0.9})


def test_whose_a_score_is() -> None:
    assert languages_of(score(("eng-Latn", "deu-Latn"))) == ("deu-Latn",)
    assert languages_of(score(("deu-Latn", "rus-Cyrl"))) == ("deu-Latn", "rus-Cyrl")
    assert languages_of(score(("eng-Latn", "eng-Latn"))) == ("eng-Latn",)
    assert languages_of(score(("a", "b", "c"))) == languages_of(score(())) == ()


def test_the_worst_ten_of_many_are_named() -> None:
    many = evaluation(many_languages(), dimensions=(8,), precisions=("float32",))
    summary = summarize(many, "large")
    values = [group.macro for group in summary.languages]
    assert values == sorted(values) and len(values) == 240
    worst = as_dict(summary)["worst"]
    assert len(worst) == 10 and worst[0] == summary.languages[0].name


def test_tasks_have_intervals_where_examples_have_scores() -> None:
    made = evaluation()
    tasks = {task.task: task for task in summarize(made, "large").tasks}
    assert tasks["Groups"].interval is None and tasks["Names"].interval is not None
    of_subsets = [
        made.examples[found.key].mean()
        for found in made.scores
        if (found.model, found.task, found.dimension, found.precision) == ("large", "Names", 64, "float32")
    ]
    assert tasks["Names"].value == pytest.approx(np.mean(of_subsets)) == tasks["Names"].interval.mean
    assert tasks["Names"].interval.low < tasks["Names"].value < tasks["Names"].interval.high


def test_scores_that_are_not_there_are_refused(refuses: Refuses) -> None:
    made = evaluation()
    with refuses("'smalls'", "small"):
        summarize(made, "smalls")
    with refuses("no float32 scores of 65 dimensions", "64, 16"):
        summarize(made, "small", dimension=65)
    with refuses("no scores in int8"):
        summarize(made, "small", precision="int8")
    with refuses("unknown precision 'int4'"):
        summarize(made, "small", precision="int4")
