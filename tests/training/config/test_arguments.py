"""What the values of a stage's keys mean: defaults, mappings, caps, widths and the direction of a metric."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.recipes import only_stage, recipe_writer
from training.config.arguments import LORA_TARGETS, StageArguments, greater_is_better
from training.config.recipe import load_recipe
from training.models.adapters import adapter_config

LOSSES = ["loss", "eval_loss", "retrieval", "clustering", "classification", "similarity", "source/qa"]
LOSSES += ["eval_source/accuracy_qa"]
SCORES = ["pairs_accuracy", "eval_pairs_accuracy_dim64", "pairs_ndcg_at_10", "pairs_recall_at_10", "pairs_mrr"]


def stage(**keys):
    return StageArguments(**{"output_dir": "runs/x", "use_cpu": True, "model": "some/model", **keys})


def evaluated(**keys):
    return stage(**{"eval_strategy": "epoch", "evaluation_pairs": "pairs.parquet", "evaluation_sample": 5, **keys})


def test_published_numbers_are_the_defaults():
    arguments = stage(evaluation_pairs="pairs.parquet")
    assert (arguments.global_batch_size, arguments.max_length, arguments.temperature) == (512, 1024, 0.05)
    assert arguments.num_hard_negatives == {"retrieval": 7, "clustering": 9, "classification": 1}
    assert (arguments.document_instruction_share, arguments.validation_share) == (0.3, 0.01)
    assert (arguments.matryoshka, arguments.matryoshka_min_dim, arguments.mask_duplicates) == (True, 8, False)
    assert (arguments.evaluation_sample, arguments.early_stopping_patience) == (0, None)
    assert stage().prepared_folder == Path("runs/x/prepared")
    assert stage(prepared_dir="shared").prepared_folder == Path("shared")
    counts = {"retrieval": 0, "clustering": 3, "classification": 2}
    assert stage(**{f"num_hard_negatives_{kind}": n for kind, n in counts.items()}).num_hard_negatives == counts


@pytest.mark.parametrize(
    ("cap", "source_caps", "expected"),
    [
        (None, None, {"web_kor": None, "sts": None}),
        (9, None, {"web_kor": 9, "sts": 9}),
        (9, '{"web_*": 5, "web_kor": 7}', {"web_kor": 5, "sts": 9}),
        (None, '{"web_*": 1e4}', {"web_kor": 10_000, "sts": None}),
    ],
)
def test_smallest_cap_that_fits_a_source(cap, source_caps, expected):
    arguments = stage(cap=cap, source_caps=source_caps)
    assert {name: arguments.cap_of(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("keys", "hidden_size", "expected"),
    [
        ({}, 320, [320, 256, 128, 64, 32, 16, 8]),
        ({"matryoshka_min_dim": 64}, 320, [320, 256, 128, 64]),
        ({"matryoshka": False, "matryoshka_dimensions": [999]}, 320, None),
        ({"matryoshka_dimensions": [64, 100, 64]}, 320, [320, 100, 64]),
        ({"matryoshka_dimensions": [1, 320]}, 320, [320, 1]),
    ],
)
def test_trained_widths(keys, hidden_size, expected):
    assert stage(**keys).train_dims(hidden_size) == expected


def test_ranks_that_do_not_fit_a_model(tiny_config, refuses):
    stage(embedding_ranks=[8, tiny_config.hidden_size]).check_ranks(tiny_config)
    with refuses("'embedding_ranks'", "[8, 33]", "up to 32"):
        stage(embedding_ranks=[8, 33]).check_ranks(tiny_config)


def test_trained_exits(refuses):
    assert stage().train_exits(4) is None
    auto = stage(exit_layers=["auto"])
    found = {layers: auto.train_exits(layers) for layers in (1, 2, 6, 8, 28)}
    assert found == {1: [1], 2: [1, 2], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8], 28: [1, 2, 4, 8, 16, 24, 28]}
    assert stage(exit_layers=["2", "1"]).train_exits(3) == [1, 2, 3]
    for wrong in ("0", "4", "all", "1.5"):
        with refuses("'exit_layers'", wrong, "3 layers"):
            stage(exit_layers=["1", wrong]).train_exits(3)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"matryoshka_dimensions": [-8, 0, 8, 321]}, ["'matryoshka_dimensions'", [-8, 0, 321], 320]),
        ({"matryoshka_min_dim": 24}, ["'matryoshka_min_dim'", 24]),
    ],
)
def test_width_that_does_not_fit_the_model(refuses, keys, parts):
    with refuses(*parts):
        stage(**keys).train_dims(320)


@pytest.mark.parametrize(("metric", "greater"), [*((m, False) for m in LOSSES), *((m, True) for m in SCORES)])
def test_direction_follows_the_metric(refuses, metric, greater):
    assert greater_is_better(metric) is greater
    assert evaluated(metric_for_best_model=metric).chooses_by_pairs == ("pairs_" in metric)
    assert evaluated(metric_for_best_model=metric).greater_is_better is greater
    assert evaluated(metric_for_best_model=metric, greater_is_better=greater).greater_is_better is greater
    with refuses("'greater_is_better'", repr(metric), f"give '{str(greater).lower()}'"):
        evaluated(metric_for_best_model=metric, greater_is_better=not greater)


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("metric", "mode"), [(None, "min"), ("retrieval", "min"), ("pairs_accuracy", "max")])
def test_a_learning_rate_that_follows_a_metric_follows_it_in_its_direction(scheduler, metric, mode):
    told = {"lr_scheduler_type": scheduler, "metric_for_best_model": metric}
    assert evaluated(**told).lr_scheduler_kwargs == {"mode": mode}
    kept = evaluated(**told, lr_scheduler_kwargs='{"patience": 3}').lr_scheduler_kwargs
    assert kept == {"patience": 3, "mode": mode}


def test_defaults_of_an_adapter(tmp_path):
    write = recipe_writer(tmp_path)
    assert adapter_config(only_stage(load_recipe(write({})))) is None
    config = adapter_config(only_stage(load_recipe(write({"lora": True}))))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (16, 32, 0.0, False)
    assert set(config.target_modules) == set(LORA_TARGETS)
    words = {"lora": True, "lora_rank": "8", "lora_target_modules": ["q_proj", "v_proj"], "lora_rslora": True}
    config = adapter_config(only_stage(load_recipe(write({}), words)))
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 16, True)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
