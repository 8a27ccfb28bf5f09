"""Of every metric that an evaluation measures it is known which direction is better."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.training.evaluation.watched_recipe import write_watched
from training.config.arguments import StageArguments
from training.config.evaluation_arguments import greater_is_better
from training.config.recipe import load_recipe
from training.run_stage import main

Refuses = Callable[..., AbstractContextManager[None]]
LOSSES = ["loss", "eval_loss", "retrieval", "clustering", "classification", "source/qa", "eval_source/accuracy_qa"]
SCORES = ["pairs_accuracy", "eval_pairs_accuracy_dim64", "pairs_ndcg_at_10", "pairs_recall_at_10", "pairs_mrr"]


def stage(**keys: Any) -> StageArguments:
    told = {"output_dir": "runs/x", "use_cpu": True, "model": "some/model", "eval_strategy": "epoch"}
    return StageArguments(**{**told, "evaluation_pairs": "pairs.parquet", "evaluation_sample": 5, **keys})


@pytest.mark.parametrize(("metric", "greater"), [*((m, False) for m in LOSSES), *((m, True) for m in SCORES)])
def test_direction_follows_the_metric(refuses: Refuses, metric: str, greater: bool) -> None:
    assert greater_is_better(metric) is greater
    assert stage(metric_for_best_model=metric).greater_is_better is greater
    assert stage(metric_for_best_model=metric, greater_is_better=greater).greater_is_better is greater
    with refuses("'greater_is_better'", repr(metric), f"'greater_is_better: {str(greater).lower()}'"):
        stage(metric_for_best_model=metric, greater_is_better=not greater)


def test_direction_where_no_metric_is_named(refuses: Refuses) -> None:
    assert stage().greater_is_better is None
    assert stage(load_best_model_at_end=True, save_strategy="epoch").greater_is_better is False
    with refuses("'greater_is_better'", "'loss'"):
        stage(load_best_model_at_end=True, save_strategy="epoch", greater_is_better=True)


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("metric", "mode"), [(None, "min"), ("retrieval", "min"), ("pairs_accuracy", "max")])
def test_a_learning_rate_that_follows_a_metric_follows_it_in_its_direction(
    refuses: Refuses, scheduler: str, metric: str | None, mode: str
) -> None:
    told = {"lr_scheduler_type": scheduler, "metric_for_best_model": metric}
    assert stage(**told).lr_scheduler_kwargs == {"mode": mode}
    kept = stage(**told, lr_scheduler_kwargs='{"patience": 3}').lr_scheduler_kwargs
    assert kept == {"patience": 3, "mode": mode}
    other = {"min": "max", "max": "min"}[mode]
    with refuses("'lr_scheduler_kwargs'", f"'mode: {mode}'"):
        stage(**told, lr_scheduler_kwargs={"mode": other})


@pytest.mark.parametrize("metric", ["retrieval", "source/tiny_retrieval"])
def test_the_stage_ends_in_the_checkpoint_of_the_lowest_loss(tmp_path: Path, metric: str) -> None:
    recipe = write_watched(tmp_path, metric_for_best_model=metric, load_best_model_at_end=True)
    assert main([str(recipe)]) == 0
    run = tmp_path / "run"
    state = json.loads((run / "checkpoint-10/trainer_state.json").read_text())
    found = {line["step"]: line[f"eval_{metric}"] for line in state["log_history"] if "eval_loss" in line}
    lowest = min(found, key=lambda step: found[step])
    assert state["best_model_checkpoint"] == str(run / f"checkpoint-{lowest}")
    assert state["best_metric"] == found[lowest] < max(found.values())


def test_every_metric_that_is_measured_has_the_direction_of_its_kind(tmp_path: Path) -> None:
    from training.stages.setup import set_up

    (only,) = load_recipe(write_watched(tmp_path)).stages
    Path(only.arguments.output_dir).mkdir(parents=True)
    names = set_up(only).metric_names
    scores = {name for name in names if "pairs_" in name}
    assert scores and set(names) - scores
    assert {name for name in names if greater_is_better(name)} == scores
