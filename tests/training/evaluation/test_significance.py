"""Intervals cover, tests find what is there, both agree with scipy, and comparisons correct for the number of tasks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.training.evaluation.synthetic import evaluation, score
from training.evaluation.records import Evaluation
from training.evaluation.significance import (
    bootstrap_interval,
    compare_models,
    comparison_of_folders,
    examples_of,
    holm,
    paired_test,
)


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
    assert bootstrap_interval([values], seed=4).low == pytest.approx(whole.low, abs=0.01)


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


def test_p_values_are_those_of_scipy() -> None:
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


def test_a_real_difference_is_found_and_none_where_there_is_none() -> None:
    base = np.random.default_rng(2).random(1000)
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
    # The large group has no difference, the small one all of it.
    test = paired_test([np.ones(12), np.ones(500)], [np.zeros(12), np.ones(500)])
    assert (test.first, test.second) == (1.0, 0.5) and test.p_value == pytest.approx(2 / 2**12)


def test_holm_is_the_step_down_of_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_examples_are_found_by_score_or_not_at_all(refuses) -> None:
    made = score()
    found = Evaluation(scores=[made])
    assert examples_of(found, [made]) is None
    found.examples[made.key] = np.array([0, 1], np.float32)
    assert [values.tolist() for values in examples_of(found, [made])] == [[0, 1]]
    with refuses("not finite"):
        bootstrap_interval([[1.0, float("nan")]])


def test_a_better_model_is_found_task_by_task_and_overall() -> None:
    comparison = compare_models(evaluation(), "large", "small")
    tasks = {task.task: task for task in comparison.tasks}
    assert comparison.verdict == "the first is better" == tasks["Names"].verdict == tasks["Pairs"].verdict
    assert tasks["Groups"].verdict.startswith("not tested") and tasks["Groups"].test is None
    assert compare_models(evaluation(), "small", "large").verdict == "the second is better"


def test_equal_models_do_not_differ() -> None:
    rng = np.random.default_rng(4)
    made = Evaluation()
    for found in (score(model=model, task=task, examples=200) for model in ("a", "b") for task in ("x", "y", "z")):
        made.scores.append(found)
        made.examples[found.key] = (rng.random(200) < 0.6).astype(np.float32)
    comparison = compare_models(made, "a", "b")
    assert comparison.verdict == "no difference found" and not any(task.differs for task in comparison.tasks)
    assert [task.p_adjusted for task in comparison.tasks] == holm([task.test.p_value for task in comparison.tasks])


def test_overall_is_the_mean_over_tasks_of_means_over_subsets() -> None:
    made, means = evaluation(), {}
    overall = compare_models(made, "large", "small", dimension=16, precision="binary").overall
    for model in ("large", "small"):
        of_tasks = []
        for task in ("Names", "Pairs"):
            scores = made.select(model=model, task=task, dimension=16, precision="binary")
            of_tasks.append(np.mean([made.examples[found.key].mean() for found in scores]))
        means[model] = np.mean(of_tasks)
    assert (overall.first, overall.second) == pytest.approx((means["large"], means["small"]))
    assert overall.difference.mean == pytest.approx(means["large"] - means["small"])


def test_tasks_and_subsets_of_one_model_are_left_out() -> None:
    made = evaluation()
    made.scores += [score(("ita-Latn",), model="large", value=1.0), score(model="large", task="Other")]
    comparison = compare_models(made, "large", "small")
    assert comparison.left_out == ["Other"]
    assert {task.task: task.subsets for task in comparison.tasks}["Names"] == 6


def test_two_folders_are_compared_though_their_models_share_a_name(tmp_path: Path, refuses) -> None:
    for folder, quality in (("old", 0.4), ("new", 0.8)):
        evaluation(qualities={"model": quality}).save(tmp_path / folder)
    comparison = comparison_of_folders(tmp_path / "old", tmp_path / "new")
    assert comparison.verdict == "the second is better"
    assert (comparison.first, comparison.second) == ("model", f"{tmp_path / 'new'}: model")
    content = json.loads(json.dumps(asdict(comparison)))
    assert content["verdict"] == "the second is better" and all("verdict" in task for task in content["tasks"])
    evaluation().save(tmp_path / "both")
    with refuses(tmp_path / "both", "2 models", "small, large"):
        comparison_of_folders(tmp_path / "both", tmp_path / "old")


def test_models_that_cannot_be_compared_are_refused(refuses) -> None:
    made = evaluation()
    with refuses("with itself"):
        compare_models(made, "small", "small")
    with refuses("'huge'", "large"):
        compare_models(made, "small", "huge")
    shorter = made.select(model="small", task="Names", dimension=64, precision="float32")[0]
    made.examples[shorter.key] = made.examples[shorter.key][:-1]
    with refuses("'Names'", shorter.subset, "40 examples", "39"):
        compare_models(made, "large", "small")
    made.scores = [found for found in made.scores if (found.model == "small") != (found.task == "Names")]
    with refuses("no task in common"):
        compare_models(made, "small", "large")
