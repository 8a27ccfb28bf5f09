"""A comparison finds what differs, corrects for the number of tasks and names what it cannot test."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from tests.training.evaluation.synthetic import evaluation, score
from training.evaluation.compare import compare_models, comparison_as_dict, comparison_of_folders
from training.evaluation.records import Evaluation
from training.evaluation.significance import holm

Refuses = Callable[..., AbstractContextManager[None]]


def test_a_better_model_is_found_task_by_task_and_overall() -> None:
    comparison = compare_models(evaluation(), "large", "small")
    tasks = {task.task: task for task in comparison.tasks}
    assert comparison.verdict == "the first is better" == tasks["Names"].verdict == tasks["Pairs"].verdict
    assert tasks["Groups"].verdict.startswith("not tested") and tasks["Groups"].test is None
    assert compare_models(evaluation(), "small", "large").verdict == "the second is better"


def test_equal_models_do_not_differ() -> None:
    rng = np.random.default_rng(4)
    made = Evaluation()
    for model in ("a", "b"):
        for task in ("x", "y", "z"):
            found = score(model=model, task=task, examples=200)
            made.scores.append(found)
            made.examples[found.key] = (rng.random(200) < 0.6).astype(np.float32)
    comparison = compare_models(made, "a", "b")
    assert comparison.verdict == "no difference found" and not any(task.differs for task in comparison.tasks)
    assert [task.p_adjusted for task in comparison.tasks] == holm([task.test.p_value for task in comparison.tasks])


def test_overall_is_the_mean_over_tasks_of_means_over_subsets() -> None:
    made = evaluation()
    comparison = compare_models(made, "large", "small", dimension=16, precision="binary")
    means = {}
    for model in ("large", "small"):
        of_tasks = []
        for task in ("Names", "Pairs"):
            scores = made.select(model=model, task=task, dimension=16, precision="binary")
            of_tasks.append(np.mean([made.examples[found.key].mean() for found in scores]))
        means[model] = np.mean(of_tasks)
    assert comparison.overall.first == pytest.approx(means["large"])
    assert comparison.overall.second == pytest.approx(means["small"])
    assert comparison.overall.difference.mean == pytest.approx(means["large"] - means["small"])


def test_tasks_and_subsets_of_one_model_are_left_out() -> None:
    made = evaluation()
    extra = score(("ita-Latn",), model="large", value=1.0)
    made.scores += [extra, score(model="large", task="Other")]
    comparison = compare_models(made, "large", "small")
    assert comparison.left_out == ["Other"]
    assert {task.task: task.subsets for task in comparison.tasks}["Names"] == 6


def test_two_folders_are_compared_though_their_models_share_a_name(tmp_path: Path) -> None:
    for folder, quality in (("old", 0.4), ("new", 0.8)):
        evaluation(qualities={"model": quality}).save(tmp_path / folder)
    comparison = comparison_of_folders(tmp_path / "old", tmp_path / "new")
    assert comparison.verdict == "the second is better"
    assert (comparison.first, comparison.second) == ("model", f"{tmp_path / 'new'}: model")
    content = json.loads(json.dumps(comparison_as_dict(comparison)))
    assert content["verdict"] == "the second is better" and all("verdict" in task for task in content["tasks"])


def test_bad_input_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    made = evaluation()
    with refuses("with itself"):
        compare_models(made, "small", "small")
    with refuses("'huge'", "large"):
        compare_models(made, "small", "huge")
    made.scores = [found for found in made.scores if (found.model, found.task) != ("small", "Names")]
    made.scores = [found for found in made.scores if found.model == "small" or found.task == "Names"]
    with refuses("no task in common"):
        compare_models(made, "small", "large")
    made = evaluation()
    shorter = made.select(model="small", task="Names", dimension=64, precision="float32")[0]
    made.examples[shorter.key] = made.examples[shorter.key][:-1]
    with refuses("'Names'", shorter.subset, "40 examples", "39"):
        compare_models(made, "large", "small")
    evaluation().save(tmp_path)
    with refuses(tmp_path, "2 models", "small, large"):
        comparison_of_folders(tmp_path, tmp_path)
