"""Keys that a stage was given and does not read, since another key says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.config.evaluation_arguments import FOLLOWING_SCHEDULERS
from training.config.recipe import Stage

_PAIRS = "evaluation_pairs: FILE"


def unread_keys(stage: Stage) -> Iterator[str]:
    """A line for each key that has no effect beside the others, with the line to write.

    No error: a recipe gives keys to all of its stages, and the command line to all that run.

    Args:
        stage: A stage that trains.
    """
    args = stage.arguments
    rules = {**_of_schedule(args), **_of_evaluation(args), **_of_texts(args)}
    for key, (read, line) in rules.items():
        if key in stage.keys and not read:
            yield f"stage {stage.name!r}: key {key!r} has no effect without '{line}'"


def _of_schedule(args: Any) -> dict[str, tuple[bool, str]]:
    schedule = args.lr_scheduler_type.value
    adam = "adam" in args.optim.value or "lion" in args.optim.value
    return {
        "warmup_steps": (
            schedule not in ("constant", *FOLLOWING_SCHEDULERS),
            "lr_scheduler_type: constant_with_warmup",
        ),
        "num_train_epochs": (args.max_steps < 1, "max_steps: -1"),
        "optim_target_modules": (args.optim.value.startswith(("galore", "apollo")), "optim: apollo_adamw"),
        "lr_scheduler_kwargs": (not schedule.startswith("constant"), "lr_scheduler_type: TYPE"),
        **{key: (adam, "optim: adamw_torch") for key in ("adam_beta1", "adam_beta2", "adam_epsilon")},
    }


def _of_evaluation(args: Any) -> dict[str, tuple[bool, str]]:
    chooses = args.load_best_model_at_end or args.save_strategy.value == "best"
    chooses = chooses or args.early_stopping_patience is not None
    chooses = chooses or args.lr_scheduler_type.value in FOLLOWING_SCHEDULERS
    best = (chooses, "load_best_model_at_end: true")
    return {
        "eval_steps": (args.eval_strategy.value == "steps", "eval_strategy: steps"),
        "eval_delay": (args.eval_strategy.value != "no", "eval_strategy: steps"),
        "save_steps": (args.save_strategy.value == "steps", "save_strategy: steps"),
        "save_total_limit": (args.save_strategy.value != "no", "save_strategy: steps"),
        "logging_steps": (args.logging_strategy.value == "steps", "logging_strategy: steps"),
        **dict.fromkeys(("metric_for_best_model", "greater_is_better"), best),
        "evaluation_candidates": (args.evaluation_pairs is not None, _PAIRS),
        "evaluation_sample": (args.evaluation_pairs is not None, _PAIRS),
        "evaluation_sample_candidates": (bool(args.evaluation_sample), "evaluation_sample: NUMBER"),
    }


def _of_texts(args: Any) -> dict[str, tuple[bool, str]]:
    matryoshka = (args.matryoshka, "matryoshka: true")
    powers = (args.matryoshka_dimensions is None, "matryoshka_dimensions: null")
    checkpoints = (args.activation_checkpointing, "activation_checkpointing: true")
    return {
        "tokenizer_vocab_size": (args.tokenizer == "train", "tokenizer: train"),
        "document_instruction_share": (args.instructions, "instructions: true"),
        "matryoshka_dimensions": matryoshka,
        "matryoshka_min_dim": powers if args.matryoshka else matryoshka,
        **dict.fromkeys(("calibration_texts", "prune_hidden", "prune_layers"), (args.prunes, "prune_to: SHAPE")),
        "distillation_weight": (args.teacher is not None, "teacher: MODEL"),
        **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), checkpoints),
        "liger_kernel_config": (args.use_liger_kernel, "use_liger_kernel: true"),
    }
