"""The keys of a stage: their defaults, their ranges, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from training.config.arguments import StageArguments

Refuses = Callable[..., AbstractContextManager[None]]


def stage(**keys: Any) -> StageArguments:
    return StageArguments(**{"output_dir": "runs/x", "use_cpu": True, "model": "some/model", **keys})


def test_published_numbers_are_the_defaults() -> None:
    arguments = stage()
    assert (arguments.global_batch_size, arguments.max_length, arguments.temperature) == (512, 1024, 0.05)
    assert arguments.num_hard_negatives == {"retrieval": 7, "clustering": 9, "classification": 1}
    assert (arguments.document_instruction_share, arguments.validation_share) == (0.3, 0.01)
    assert (arguments.matryoshka, arguments.matryoshka_min_dim, arguments.mask_duplicates) == (True, 8, False)


def test_hard_negatives_by_task_type() -> None:
    arguments = stage(
        num_hard_negatives_retrieval=0, num_hard_negatives_clustering=3, num_hard_negatives_classification=2
    )
    assert arguments.num_hard_negatives == {"retrieval": 0, "clustering": 3, "classification": 2}


def test_a_teacher_is_not_ignored_by_a_stage_that_prunes(refuses: Refuses) -> None:
    with refuses("'teacher' has no effect in a stage that cuts a model"):
        stage(prune_to='{"num_hidden_layers": 1}', teacher="some/teacher")


def test_prepared_folder() -> None:
    assert stage().prepared_folder == Path("runs/x/prepared")
    assert stage(prepared_dir="shared").prepared_folder == Path("shared")


@pytest.mark.parametrize(("report_to", "expected"), [("none", []), (["none"], []), (["tensorboard"], ["tensorboard"])])
def test_trackers(report_to: Any, expected: list[str]) -> None:
    assert stage(report_to=report_to).report_to == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("validation_share", -0.1),
        ("validation_share", 1.1),
        ("validation_share", float("nan")),
        ("document_instruction_share", -0.1),
        ("document_instruction_share", 30),
        ("max_length", 0),
        ("tokenizer_vocab_size", 0),
        ("tokenizer_vocab_size", 258),
        ("matryoshka_min_dim", 0),
        ("cap", 0),
        ("cap", -1),
        ("global_batch_size", 0),
        ("num_hard_negatives_retrieval", -1),
        ("num_hard_negatives_clustering", -1),
        ("num_hard_negatives_classification", -1),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("num_train_epochs", 0.0),
        ("num_train_epochs", -1.0),
        ("num_train_epochs", 1e30),
        ("max_steps", 0),
        ("max_steps", -2),
        ("save_steps", 0),
        ("save_total_limit", 0),
        ("eval_steps", -5),
        ("logging_steps", -5),
        ("learning_rate", -1e-3),
        ("max_grad_norm", -1.0),
        ("dataloader_num_workers", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 2**70),
    ],
)
def test_value_out_of_range(refuses: Refuses, key: str, value: float) -> None:
    with refuses(repr(key), value):
        stage(**{key: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["num_train_epochs", "learning_rate", "eval_steps", "logging_steps", "adam_beta1"])
def test_number_that_is_not_finite(refuses: Refuses, key: str, value: float) -> None:
    with refuses(repr(key), "finite number", value):
        stage(**{key: value, "eval_strategy": "steps"})


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_number_in_a_mapping_that_is_not_finite(refuses: Refuses, number: str) -> None:
    with refuses("'lr_scheduler_kwargs'", f"{number} is no number"):
        stage(lr_scheduler_kwargs=f'{{"min_lr": {number}}}', lr_scheduler_type="cosine_with_min_lr")
    with refuses("'lr_scheduler_kwargs'", "finite number"):
        stage(lr_scheduler_kwargs={"min_lr": float(number)})
    with refuses("'model_config'", f"{number} is no number"):
        stage(model=None, model_config=f'{{"rope_theta": {number}}}')


@pytest.mark.parametrize("key", ["max_steps", "cap", "max_length", "global_batch_size", "tokenizer_vocab_size"])
def test_integer_of_more_than_64_bits(refuses: Refuses, key: str) -> None:
    with refuses(repr(key), "64 bits"):
        stage(**{key: 2**64})
    with refuses("'matryoshka_dimensions'", "64 bits"):
        stage(matryoshka_dimensions=[8, 2**64])


def test_gradients_may_be_measured_without_being_clipped() -> None:
    assert stage(max_grad_norm=float("inf")).max_grad_norm == float("inf")


def test_half_precision_that_a_cpu_does_not_compute_in(refuses: Refuses) -> None:
    with refuses("'fp16'", "no effect on a CPU", "'bf16: true'"):
        stage(fp16=True)


def test_kernels_whose_package_is_missing(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.config.arguments.is_liger_kernel_available", lambda: False)
    with refuses("'use_liger_kernel'", "pip install liger-kernel"):
        stage(use_liger_kernel=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("validation_share", 0.0),
        ("max_steps", 1),
        ("seed", 2**32 - 1),
        ("num_train_epochs", 0.01),
        ("document_instruction_share", 1.0),
        ("max_length", 1),
        ("tokenizer_vocab_size", 259),  # every byte and three special tokens
        ("cap", 1),
        ("global_batch_size", 1),
        ("num_hard_negatives_retrieval", 0),
    ],
)
def test_value_at_the_end_of_its_range(key: str, value: float) -> None:
    assert getattr(stage(**{key: value}), key) == value


@pytest.mark.parametrize(("model", "config"), [(None, None), ("some/model", "{}")])
def test_model_and_model_config_are_alternatives(refuses: Refuses, model: str | None, config: str | None) -> None:
    with refuses("'model'", "'model_config'", "exactly one"):
        stage(model=model, model_config=config)


def test_model_config_fields() -> None:
    assert stage().model_config_fields() == {}
    told = stage(model=None, model_config='{"hidden_size": 64, "family": "f2llm-v2-80m", "layer_types": null}')
    assert told.model_config_fields() == {"hidden_size": 64, "family": "f2llm-v2-80m", "layer_types": None}


@pytest.mark.parametrize("config", ["{", "hidden_size: 64", "[64]", "64", '"x"'])
def test_model_config_that_is_no_mapping(refuses: Refuses, config: str) -> None:
    with refuses("'model_config'"):
        stage(model=None, model_config=config)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("hiddensize", "'hidden_size'"), ("num_layers", "'num_hidden_layers'"), ("fam", "'family'")],
)
def test_field_that_a_model_does_not_have(refuses: Refuses, name: str, remedy: str) -> None:
    with refuses("'model_config'", f"unknown key {name!r}", f"did you mean {remedy}?"):
        stage(model=None, model_config=f'{{"hidden_size": 64, "{name}": 2}}')


def test_builder_options() -> None:
    assert stage().builder_fields() == {}
    told = stage(builder="gettext", builder_options='{"locale_dirs": ["here"]}')
    assert told.builder_fields() == {"locale_dirs": ["here"]}


@pytest.mark.parametrize(("builder", "options"), [("gettext", "{"), ("gettext", "[1]"), (None, '{"num_negatives": 1}')])
def test_builder_options_that_are_none(refuses: Refuses, builder: str | None, options: str) -> None:
    with refuses("'builder_options'"):
        stage(builder=builder, builder_options=options)


@pytest.mark.parametrize(
    ("cap", "source_caps", "expected"),
    [
        (None, None, {"web_kor": None, "sts": None}),
        (9, None, {"web_kor": 9, "sts": 9}),
        (None, '{"web_*": 5}', {"web_kor": 5, "sts": None}),
        (9, '{"web_*": 5, "web_kor": 7}', {"web_kor": 5, "sts": 9}),
        (3, '{"*": 5}', {"web_kor": 3, "sts": 3}),
        (None, '{"web_*": 1e4}', {"web_kor": 10_000, "sts": None}),
    ],
)
def test_smallest_cap_that_fits_a_source(cap: int | None, source_caps: str | None, expected: dict[str, Any]) -> None:
    arguments = stage(cap=cap, source_caps=source_caps)
    assert {name: arguments.cap_of(name) for name in expected} == expected


@pytest.mark.parametrize("cap", ["0", "-1", "1.5", "1e-4", '"80k"', "null", "true", "[5]"])
def test_cap_of_a_source_that_is_no_count(refuses: Refuses, cap: str) -> None:
    with refuses("'source_caps'", "'web_*'", "positive integer"):
        stage(source_caps=f'{{"sts": 5, "web_*": {cap}}}')


@pytest.mark.parametrize("caps", ["{", "[64]", "64"])
def test_source_caps_that_are_no_mapping(refuses: Refuses, caps: str) -> None:
    with refuses("'source_caps'"):
        stage(source_caps=caps)


# Matryoshka widths


@pytest.mark.parametrize(
    ("keys", "hidden_size", "expected"),
    [
        ({}, 320, [320, 256, 128, 64, 32, 16, 8]),
        ({"matryoshka_min_dim": 64}, 320, [320, 256, 128, 64]),
        ({"matryoshka_min_dim": 32}, 32, [32]),
        ({"matryoshka": False}, 320, None),
        ({"matryoshka": False, "matryoshka_dimensions": [999]}, 320, None),
        ({"matryoshka_dimensions": [64, 100, 64]}, 320, [320, 100, 64]),
        ({"matryoshka_dimensions": [1, 320]}, 320, [320, 1]),
    ],
)
def test_trained_widths(keys: dict[str, Any], hidden_size: int, expected: list[int] | None) -> None:
    assert stage(**keys).train_dims(hidden_size) == expected


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [({"max_tokens_per_forward": 100}, "max_tokens_per_forward"), ({"distillation_weight": -1.0}, "distillation")],
)
def test_numbers_out_of_range(refuses: Refuses, keys: dict[str, Any], wrong: str) -> None:
    with refuses(wrong):
        stage(**keys)


@pytest.mark.parametrize(("dims", "wrong"), [([64, 512], [512]), ([0], [0]), ([-8, 8, 321], [-8, 321])])
def test_width_that_does_not_fit_the_model(refuses: Refuses, dims: list[int], wrong: list[int]) -> None:
    with refuses("'matryoshka_dimensions'", wrong, 320):
        stage(matryoshka_dimensions=dims).train_dims(320)


@pytest.mark.parametrize("min_dim", [512, 24])
def test_narrowest_width_that_does_not_fit_the_rule(refuses: Refuses, min_dim: int) -> None:
    with refuses("'matryoshka_min_dim'", min_dim):
        stage(matryoshka_min_dim=min_dim).train_dims(320)
