"""Values and keys that a stage refuses, and keys that have no effect beside others, with what to give instead."""

from __future__ import annotations

import math

import pytest

from tests.training.recipes import error_of, recipe_writer, write_single_stage
from training.config.arguments import LEARNT, MACHINE, PATHS, REFUSED, RUNNING, StageArguments, check_given
from training.config.checks import unread_keys
from training.config.recipe import command_line_overrides, load_recipe
from training.run_stage import main

OUT_OF_RANGE = {
    **{"validation_share": [-0.1, 1.1, math.nan], "document_instruction_share": [-0.1, 30]},
    **{
        "tokenizer_vocab_size": [0, 258],
        "temperature": [0.0, -1.0, math.nan],
        "source_temperature": [0.0, -2.0, math.inf],
        "num_train_epochs": [0.0, -1.0, 1e30],
    },
    **{"on_bad_row": ["skip"], "learning_rate": [math.nan, math.inf], "eval_steps": [math.nan, -5]},
    **{"max_steps": [0, -2], "seed": [-1, 2**32, 2**70], "lora_alpha": [-2], "lora_dropout": [1.0], "cap": [0, -1]},
    **{"prune_hidden": ["norm"], "prune_layers": ["last"], "early_stopping_threshold": [-0.1, math.nan]},
    **{key: [0] for key in ("max_length", "matryoshka_min_dim", "global_batch_size", "save_steps", "save_total_limit")},
    **{key: [0] for key in ("evaluation_sample_candidates", "early_stopping_patience", "lora_rank")},
    **{key: [0] for key in ("planned_text_tokens", "max_tokens_per_forward", "calibration_texts")},
    **{key: [-1] for key in (f"num_hard_negatives_{kind}" for kind in ("retrieval", "clustering", "classification"))},
    **{key: [-5] for key in ("logging_steps", "dataloader_num_workers", "evaluation_sample")},
    **{key: [-1.0] for key in ("distillation_weight", "score_distillation_weight", "max_grad_norm")},
    **{"mask_false_negatives": [-1.1, 2.0, math.nan], "teacher_temperature": [0.0]},
}
# At the end of its range; every byte and three special tokens make up the smallest vocabulary.
IN_RANGE = {
    **{"validation_share": 0.0, "max_steps": 1, "seed": 2**32 - 1, "num_train_epochs": 0.01, "max_length": 1},
    **{"document_instruction_share": 1.0, "tokenizer_vocab_size": 259, "cap": 1, "global_batch_size": 1},
    **{"num_hard_negatives_retrieval": 0, "max_grad_norm": math.inf},
}
LORA = {"lora": True}
PRUNED = {"prune_to": '{"num_hidden_layers": 1}'}
SAMPLED = {"evaluation_pairs": "pairs.parquet", "evaluation_sample": 9, "eval_strategy": "steps", "eval_steps": 5}
BEST = {"metric_for_best_model": "pairs_accuracy"}
PATIENT = {"early_stopping_patience": 2}
NEW = {"model": None}
REENTRANT = {"use_reentrant": True}
SECRET = "hf_" + "aB3" * 12


def stage(**keys):
    return StageArguments(**{"output_dir": "runs/x", "use_cpu": True, "model": "some/model", "report_to": [], **keys})


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values])
def test_value_out_of_range(refuses, key, value):
    with refuses(repr(key), value):
        stage(lora=key.startswith("lora_"), **{key: value})


@pytest.mark.parametrize(("key", "value"), IN_RANGE.items())
def test_value_at_the_end_of_its_range(key, value):
    assert getattr(stage(**{key: value}), key) == value


@pytest.mark.parametrize("value", ["{", "hidden_size: 64", "[64]", "64", '"x"'])
@pytest.mark.parametrize("key", ["model_config", "builder_options", "source_caps", "prune_to"])
def test_text_that_is_no_mapping(refuses, key, value):
    with refuses(repr(key)):
        stage(builder="gettext", **{"model": None if key == "model_config" else "m", key: value})


@pytest.mark.parametrize("cap", ["0", "-1", "1.5", "1e-4", '"80k"', "null", "true", "[5]"])
def test_cap_of_a_source_that_is_no_count(refuses, cap):
    with refuses("'source_caps'", "'web_*'", "positive integer"):
        stage(source_caps=f'{{"sts": 5, "web_*": {cap}}}')


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"fp16": True}, ["'fp16'", "no effect on a CPU", "'bf16: true'"]),
        ({"max_tokens_per_forward": 100}, ["'max_tokens_per_forward'", "'max_length' (1024)"]),
        ({"task_types": ["retrieval", "sts"]}, ["'task_types'", "'sts'", "clustering"]),
        ({"optim_args": "a=1"}, ["'optim_args'", "'optim: OPTIMIZER'"]),
        ({"fsdp_config": {"a": 1}}, ["'fsdp_config'", "'fsdp: true'"]),
        ({"activation_checkpointing_kwargs": {"use_reentrent": True}}, ["did you mean 'use_reentrant'?"]),
        ({"lr_scheduler_kwargs": "abc"}, ["'lr_scheduler_kwargs' is not valid JSON"]),
        ({"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": '{"mode": "max"}'}, ["'loss'", "mode: min"]),
        ({"liger_kernel_config": "{rope"}, ["'liger_kernel_config' is not valid JSON"]),
        ({"builder_options": '{"num_negatives": 1}'}, ["'builder_options'", "without 'builder'"]),
        ({"importance": "x"}, ["'importance'", "without 'prune_to'"]),
        ({"teacher_projection": True}, ["'teacher_projection'", "without 'teacher'"]),
        ({"teacher": "t", "teacher_temperature": 0.1}, ["'teacher_temperature'", "'score_distillation_weight: 1'"]),
        ({"quantized": '{"int4": 1}'}, ["unknown key 'int4'", "key 'quantized'", "int8"]),
        *(
            ({"quantized": f'{{"int8": {bad}}}'}, ["'quantized'", "'int8'", "from 0 on"])
            for bad in ("-1", '"1"', "true")
        ),
        ({"quantized": '{"binary": Infinity}'}, ["'quantized'", "'binary'", "from 0 on"]),
        ({"spread_weight": -0.1}, ["'spread_weight'", "at least 0"]),
        (NEW, ["'model'", "'model_config'", "exactly one"]),
        ({"model_config": "{}"}, ["'model'", "'model_config'", "exactly one"]),
        (NEW | {"model_config": '{"hiddensize": 2}'}, ["unknown key 'hiddensize'", "did you mean 'hidden_size'?"]),
        ({"tokenizer": "train"}, ["'tokenizer'", "leave the key out"]),
        ({"model_family": "f2llm-v2-9b"}, ["'model_family'", "did you mean"]),
        (NEW | {"model_config": "{}", "model_family": "f2llm-v2-8b"}, ["'model_family'", "without 'model'"]),
        (PRUNED | NEW | {"model_config": "{}"}, ["cut a model; give it as 'model'"]),
        (PRUNED | LORA, ["'prune_to'", "take 'lora' out"]),
        (LORA | NEW | {"model_config": "{}"}, ["'lora'", "give it as 'model'"]),
        (LORA | {"compile": True, "lora_dropout": 0.1}, ["'lora_dropout'", "'compile'"]),
        (LORA | {"compile": True, "lora_dora": True}, ["'compile'", "DoRA"]),
        ({"lora_rank": 8}, ["'lora_rank'", "without 'lora: true'"]),
        (BEST, ["'metric_for_best_model'", "'pairs_accuracy'", "'evaluation_pairs'"]),
        (SAMPLED | BEST | {"eval_strategy": "no"}, ["'evaluation_sample' has no effect", "'eval_strategy: epoch'"]),
        (SAMPLED | PATIENT, ["'early_stopping_patience' has no effect", "'metric_for_best_model: loss'"]),
        (PATIENT | {"metric_for_best_model": "loss"}, ["'early_stopping_patience'", "'eval_strategy: epoch'"]),
        (SAMPLED | BEST | {"early_stopping_threshold": 0.1}, ["'early_stopping_threshold' has no effect"]),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, ["'eval_strategy: epoch'"]),
        ({"push_checkpoints": "no repository"}, ["'push_checkpoints'"]),
        ({"push_checkpoints": "org/name", "save_strategy": "no"}, ["'push_checkpoints'", "'save_strategy: epoch'"]),
        (
            {"exit_layers": ["auto"], "gradient_checkpointing": True, "gradient_checkpointing_kwargs": REENTRANT},
            ["'exit_layers'", "use_reentrant"],
        ),
        ({"embedding_ranks": [0, 8]}, ["'embedding_ranks'", "at least 1"]),
        (LORA | {"embedding_ranks": [8]}, ["'embedding_ranks'", "take 'lora' out"]),
        (LORA | {"push_checkpoints": "org/name"}, ["'push_checkpoints'", "hold an adapter alone"]),
    ],
)
def test_keys_that_contradict_each_other_or_have_no_effect(refuses, keys, parts):
    with refuses(*parts):
        stage(**keys)


def test_liger_kernels(refuses, monkeypatch):
    monkeypatch.setattr("training.config.checks.is_liger_kernel_available", lambda: False)
    with refuses("'use_liger_kernel'", "pip install liger-kernel"):
        stage(use_liger_kernel=True)
    monkeypatch.setattr("training.config.checks.is_liger_kernel_available", lambda: True)
    assert stage(use_liger_kernel=True).liger_kernel_config == {"fused_linear_cross_entropy": False}
    with refuses("'liger_kernel_config'", "'fused_linear_cross_entropy'", "give false"):
        stage(liger_kernel_config='{"fused_linear_cross_entropy": true}')


@pytest.mark.parametrize(
    ("keys", "beside", "line"),
    [
        ({"eval_steps": 5}, {"eval_strategy": "steps"}, None),
        ({"save_steps": 5, "save_strategy": "epoch"}, {"save_strategy": "steps"}, None),
        ({"logging_steps": 5, "logging_strategy": "epoch"}, {"logging_strategy": "steps"}, None),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant_with_warmup"}, None),
        ({"adam_beta1": 0.8, "optim": "sgd"}, {"optim": "adamw_torch"}, None),
        ({"metric_for_best_model": "loss", "eval_strategy": "steps", "save_strategy": "steps"},
         {"load_best_model_at_end": True}, "load_best_model_at_end: true"),
        ({"distillation_weight": 0.5}, {"teacher": "some/teacher"}, "teacher: MODEL"),
        ({"teacher_projection": True, "teacher": "t", "distillation_weight": 0.0}, {"distillation_weight": 1.0},
         "distillation_weight: 1"),
        ({"document_instruction_share": 0.5, "instructions": False}, {"instructions": True}, "instructions: true"),
        ({"matryoshka_min_dim": 8, "matryoshka": False}, {"matryoshka": True}, "matryoshka: true"),
        ({"matryoshka_min_dim": 8, "matryoshka_dimensions": [16]}, {"matryoshka_dimensions": None},
         "matryoshka_dimensions: null"),
        ({"num_train_epochs": 3, "max_steps": 5}, {"max_steps": -1}, None),
        ({"calibration_texts": 5}, {"prune_to": {"num_hidden_layers": 1}}, "prune_to: SHAPE"),
        ({"push_checkpoints": "org/name", "prune_to": {"num_hidden_layers": 1}}, {"prune_to": None}, "prune_to: null"),
        ({"exit_layers": "auto", "prune_to": {"num_hidden_layers": 1}}, {"prune_to": None}, "prune_to: null"),
        ({"optim_target_modules": "all-linear"}, {"optim": "apollo_adamw"}, None),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, {"gradient_checkpointing": True},
         "activation_checkpointing: true"),
    ],
)  # fmt: skip
def test_an_unread_key_is_logged_with_the_line_to_write(tmp_path, keys, beside, line):
    def unread(**given):
        (only,) = load_recipe(recipe_writer(tmp_path)(given)).stages
        return list(unread_keys(only.arguments, only.keys))

    line = line or ": ".join(map(str, *beside.items()))
    assert unread(**keys) == [f"key {next(iter(keys))!r} has no effect without '{line}'"]
    assert unread(**{**keys, **beside}) == []


def test_uploads_are_checked_before_the_data_is_prepared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.publishing.hub.callback.get_token", lambda: None)
    error = error_of([write_single_stage(tmp_path, push_checkpoints="org/name")], capsys)
    assert "'push_checkpoints': not logged in" in error and not (tmp_path / "run").exists()


def test_a_schedule_that_cannot_be_computed_to_its_end(tmp_path, capsys, caplog):
    keys = {"lr_scheduler_type": "polynomial", "max_steps": 2, "warmup_steps": 2}
    recipe = write_single_stage(tmp_path, **keys, eval_strategy=False, eval_steps=3)
    error = error_of([recipe], capsys)
    assert "a schedule of 2 steps" in error and "'warmup_steps: 2'" in error
    assert main([str(recipe), "--warmup_steps", "1"]) == 0
    # Keys without effect are logged when the stage runs.
    assert "stage 'single': key 'eval_steps' has no effect without 'eval_strategy: steps'" in caplog.text


def test_every_key_has_one_role():
    roles = [LEARNT, RUNNING, PATHS, MACHINE, {*REFUSED}]
    assert sum(map(len, roles)) == len(set().union(*roles))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_key_without_effect_is_refused_whatever_its_value(refuses, tmp_path, key):
    write = recipe_writer(tmp_path)
    for value in ("x", False, 3):
        with refuses("stage 'recipe'", repr(key), "no effect", REFUSED[key]):
            load_recipe(write({key: value}))
    with refuses(repr(key), REFUSED[key]):
        load_recipe(write({}), command_line_overrides([f"--{key}=x"]))
    # Nothing was given.
    load_recipe(write({key: None}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hub_token", SECRET),
        ("executor", {"name": "slurm", "env_command": f"export HF_TOKEN={SECRET}"}),
        ("executor", {"name": "slurm", "sbatch_args": {"api_key": "0123"}}),
        ("executor", '{"name": "slurm", "password": "0123"}'),
        ("builder_options", {"locale_dirs": [f"https://user:{SECRET}@host/x"]}),
        ("data_dir", "https://alice:0123@host/data"),
        ("run_name", f"try with {SECRET}"),
    ],
)
def test_no_secret_gets_into_the_folder_of_a_run(tmp_path, key, value):
    with pytest.raises(ValueError, match=key) as caught:
        load_recipe(recipe_writer(tmp_path)({key: value}))
    message = str(caught.value)
    assert "HF_TOKEN" in message and len(message.splitlines()) == 1
    assert SECRET not in message and "0123" not in message


def test_what_only_looks_like_a_secret():
    check_given({"executor": {"name": "slurm", "time": "01:00:00", "partition": "cpu"}})
    check_given({"data_dir": "hf://datasets/org/name", "model_config": {"pad_token_id": 0, "eos_token_id": 1}})
    check_given({"data_dir": "https://host:8080/data@v1", "run_name": "hf_experiment"})
