"""Intervals cover, tests find what is there, and both agree with scipy and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
from scipy import stats

from training.evaluation.records import Evaluation, Score
from training.evaluation.significance import bootstrap_interval, examples_of, holm, paired_test

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.mark.parametrize("hits", [True, False])
def test_the_interval_is_that_of_scipy(hits: bool) -> None:
    rng = np.random.default_rng(1)
    values = (rng.random(300) < 0.8).astype(float) if hits else rng.random(300)
    ours = bootstrap_interval([values], resamples=20000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, batch=500, rng=2)
    assert ours.mean == pytest.approx(values.mean()) and ours.examples == 300
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=4e-3)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=4e-3)


def test_the_interval_of_groups_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(3)
    groups = [rng.random(60), 0.5 * rng.random(200), (rng.random(90) < 0.3).astype(float)]
    drawn = [np.mean([rng.choice(values, len(values)).mean() for values in groups]) for _ in range(6000)]
    ours = bootstrap_interval(groups, resamples=6000)
    assert ours.mean == pytest.approx(np.mean([values.mean() for values in groups]))
    assert [ours.low, ours.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=4e-3)


def test_intervals_repeat_by_seed_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(200)
    whole = bootstrap_interval([values], seed=4)
    assert bootstrap_interval([values], seed=4) == whole != bootstrap_interval([values], seed=5)
    monkeypatch.setattr("training.evaluation.significance._BLOCK", 1000)
    blocked = bootstrap_interval([values], seed=4)
    assert blocked.low == pytest.approx(whole.low, abs=0.01)


@pytest.mark.parametrize("hits", [True, False])
def test_intervals_cover_the_true_mean_as_often_as_they_say(hits: bool) -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for seed in range(400):
        values = (rng.random(150) < 0.7).astype(float) if hits else rng.beta(0.7, 0.3, 150)
        interval = bootstrap_interval([values], resamples=500, seed=seed)
        covered += interval.low <= 0.7 <= interval.high
    # Three standard errors about 95 %.
    assert covered / 400 == pytest.approx(0.95, abs=0.035)


def test_few_differences_are_tested_exactly() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(10), rng.random(10) + 0.2
    theirs = stats.permutation_test(
        (first, second), lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", vectorized=True
    )
    assert paired_test([first], [second]).p_value == pytest.approx(theirs.pvalue)


def test_many_differences_agree_with_scipy() -> None:
    rng = np.random.default_rng(5)
    first = rng.random(200)
    second = first + rng.normal(0.03, 0.25, 200)
    ours = paired_test([first], [second])
    assert ours.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.015)
    assert ours.difference.mean == pytest.approx(np.mean(first - second))


def test_a_real_difference_is_found_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    base = rng.random(1000)
    hits, worse = (base < 0.7).astype(float), (base < 0.64).astype(float)
    found = paired_test([hits], [worse])
    assert found.differs and found.difference.low > 0 and found.p_value == pytest.approx(1e-4)
    same = paired_test([hits], [hits])
    assert not same.differs and same.p_value == 1 and same.difference.mean == 0


def test_false_findings_are_as_rare_as_the_level_says() -> None:
    rng = np.random.default_rng(8)
    found = sum(paired_test([rng.random(80)], [rng.random(80)], resamples=499).differs for _ in range(300))
    assert found / 300 <= 0.05 + 0.04


def test_groups_weigh_the_same_whatever_their_size() -> None:
    # The large group says nothing, the small one all.
    test = paired_test([np.ones(12), np.ones(500)], [np.zeros(12), np.ones(500)])
    assert (test.first, test.second) == (1.0, 0.5) and test.p_value == pytest.approx(2 / 2**12)


def test_holm_is_the_step_down_of_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_examples_are_found_by_score_or_not_at_all() -> None:
    score = Score("m", "t", "Retrieval", "default", ("deu-Latn",), 8, "float32", "ndcg_at_10", 0.5, 2)
    evaluation = Evaluation(scores=[score])
    assert examples_of(evaluation, [score]) is None
    evaluation.examples[score.key] = np.array([0, 1], np.float32)
    assert [values.tolist() for values in examples_of(evaluation, [score])] == [[0, 1]]


def test_bad_input_is_refused(refuses: Refuses) -> None:
    with refuses("no examples"):
        bootstrap_interval([])
    with refuses("no examples"):
        bootstrap_interval([[1.0], []])
    with refuses("not finite"):
        bootstrap_interval([[1.0, float("nan")]])
    with refuses("between 0 and 1"):
        bootstrap_interval([[1.0]], level=95)
    with refuses("at least 1"):
        bootstrap_interval([[1.0]], resamples=0)
    with refuses("same examples", "3 against 2"):
        paired_test([[1.0, 0, 0]], [[1.0, 0]])
