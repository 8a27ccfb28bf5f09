"""Intervals cover, tests find what is there, both agree with scipy, and comparisons correct for the number of tasks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests.training.evaluation.synthetic import evaluation, score
from training.evaluation.significance import bootstrap_interval, compare_models, holm, paired_test


def test_the_interval_is_that_of_scipy():
    drawn = np.random.default_rng(1).random(300)
    for values in (drawn, (drawn < 0.8).astype(float)):
        ours = bootstrap_interval([values], resamples=20000)
        theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, batch=500, rng=2)
        assert ours.mean == pytest.approx(values.mean()) and ours.examples == 300
        assert (ours.low, ours.high) == pytest.approx((*theirs.confidence_interval,), abs=4e-3)


def test_the_interval_of_groups_is_that_of_a_loop():
    rng = np.random.default_rng(3)
    groups = [rng.random(60), 0.5 * rng.random(200), (rng.random(90) < 0.3).astype(float)]
    drawn = [np.mean([rng.choice(values, len(values)).mean() for values in groups]) for _ in range(6000)]
    ours = bootstrap_interval(groups, resamples=6000)
    assert ours.mean == pytest.approx(np.mean([values.mean() for values in groups]))
    assert [ours.low, ours.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=4e-3)


def test_p_values_are_those_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.random(10), rng.random(10) + 0.2
    theirs = stats.permutation_test(
        (first, second), lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", vectorized=True
    )
    assert paired_test([first], [second]).p_value == pytest.approx(theirs.pvalue)
    rng = np.random.default_rng(5)
    first = rng.random(200)
    second = first + rng.normal(0.03, 0.25, 200)
    ours = paired_test([first], [second])
    assert ours.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.015)
    assert ours.difference.mean == pytest.approx(np.mean(first - second))


def test_holm_is_the_step_down_of_the_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def compared(made, *models):
    return {row.task: row for row in compare_models(made, *models)}


def test_a_better_model_is_found_task_by_task_and_overall():
    tasks = compared(evaluation(), "large", "small")
    assert {tasks[name].verdict for name in ("Names", "Pairs", "overall")} == {"the first is better"}
    assert tasks["Groups"].verdict.startswith("not tested") and tasks["Groups"].test is None
    assert compared(evaluation(), "small", "large")["overall"].verdict == "the second is better"
    same = compared(evaluation(qualities={"a": 0.6, "b": 0.6}), "a", "b")
    assert all(same[name].verdict == "no difference found" for name in ("Names", "Pairs", "overall"))
    tested = [tasks[name] for name in ("Names", "Pairs")]
    assert [row.p_adjusted for row in tested] == holm([row.test.p_value for row in tested])


def test_overall_is_the_mean_over_shared_tasks_of_means_over_subsets():
    made, means = evaluation(), {}
    before = compared(made, "large", "small")
    overall = before["overall"].test
    for model in ("large", "small"):
        of_tasks = []
        for task in ("Names", "Pairs"):
            scores = made.select(model=model, task=task, dimension=64, precision="float32")
            of_tasks.append(np.mean([made.examples[found.key].mean() for found in scores]))
        means[model] = np.mean(of_tasks)
    assert (overall.first, overall.second) == pytest.approx((means["large"], means["small"]))
    assert overall.difference.mean == pytest.approx(means["large"] - means["small"])
    # Tasks and subsets of one model are left out.
    made.scores += [score(("ita-Latn",), model="large", value=1.0), score(model="large", task="Other")]
    assert compared(made, "large", "small") == before


def test_models_that_cannot_be_compared_are_refused(refuses):
    made = evaluation()
    with refuses("not finite"):
        bootstrap_interval([[1.0, float("nan")]])
    with refuses("with itself"):
        compare_models(made, "small", "small")
    with refuses("'huge'", "large"):
        compare_models(made, "small", "huge")
    shorter = made.select(model="small", task="Names", dimension=64, precision="float32")[0]
    made.examples[shorter.key] = made.examples[shorter.key][:-1]
    with refuses("'Names'", "different data"):
        compare_models(made, "large", "small")
    made.scores = [found for found in made.scores if (found.model == "small") != (found.task == "Names")]
    with refuses("no task in common"):
        compare_models(made, "small", "large")
