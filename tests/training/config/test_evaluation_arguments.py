from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from training.config.arguments import StageArguments

Refuses = Callable[..., AbstractContextManager[None]]
SAMPLED = {"evaluation_pairs": "pairs.parquet", "evaluation_sample": 9, "eval_strategy": "steps", "eval_steps": 5}
BEST = {"metric_for_best_model": "pairs_accuracy"}
PATIENT = {"early_stopping_patience": 2}


def stage(**keys: Any) -> StageArguments:
    return StageArguments(**{"output_dir": "runs/x", "use_cpu": True, "model": "some/model", "report_to": [], **keys})


def test_nothing_is_evaluated_in_training_by_default() -> None:
    arguments = stage(evaluation_pairs="pairs.parquet")
    assert arguments.evaluation_sample == 0 and arguments.early_stopping_patience is None
    assert not arguments.chooses_by_pairs


@pytest.mark.parametrize("metric", ["pairs_accuracy", "eval_pairs_accuracy_dim64", "pairs_ndcg_at_10"])
def test_the_best_model_may_be_chosen_by_pairs(metric: str) -> None:
    arguments = stage(**SAMPLED, **PATIENT, metric_for_best_model=metric, load_best_model_at_end=True, save_steps=5)
    assert arguments.chooses_by_pairs and arguments.greater_is_better


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (BEST, ["'metric_for_best_model'", "'pairs_accuracy'", "'evaluation_pairs'"]),
        (BEST | {"evaluation_pairs": "pairs.parquet"}, ["'metric_for_best_model'", "'evaluation_sample'"]),
        (SAMPLED | BEST | {"evaluation_pairs": None}, ["'metric_for_best_model'", "'evaluation_pairs'"]),
        (SAMPLED | BEST | {"eval_strategy": "no"}, ["'evaluation_sample'", "'eval_strategy'"]),
        (SAMPLED | {"eval_strategy": "no"}, ["'evaluation_sample' has no effect", "'eval_strategy'"]),
        (SAMPLED | {"evaluation_sample": -1}, ["'evaluation_sample'", -1]),
        (SAMPLED | {"evaluation_sample_candidates": 0}, ["'evaluation_sample_candidates'", 0]),
        (SAMPLED | PATIENT, ["'early_stopping_patience' has no effect", "'metric_for_best_model'"]),
        (PATIENT | {"metric_for_best_model": "loss"}, ["'early_stopping_patience'", "'eval_strategy'"]),
        (SAMPLED | BEST | {"early_stopping_patience": 0}, ["'early_stopping_patience'", 0]),
        (SAMPLED | BEST | {"early_stopping_threshold": 0.1}, ["'early_stopping_threshold' has no effect"]),
        (SAMPLED | BEST | PATIENT | {"early_stopping_threshold": -0.1}, ["'early_stopping_threshold'", -0.1]),
        (SAMPLED | BEST | PATIENT | {"early_stopping_threshold": float("nan")}, ["'early_stopping_threshold'", "nan"]),
    ],
)
def test_keys_that_would_do_nothing(refuses: Refuses, keys: dict[str, Any], parts: list[Any]) -> None:
    with refuses(*parts):
        stage(**keys)
