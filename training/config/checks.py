"""Checks of a stage's keys: ranges, and keys that contradict each other or have no effect beside others."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import fields
from typing import Any

from transformers.utils import is_liger_kernel_available

from modeling_f2llm.compression import PRECISIONS
from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.common.errors import UserError
from training.common.executor import read_executor
from training.common.hub import check_repository
from training.common.yaml_file import unknown_key

# Schedulers that follow a metric by evaluations.
FOLLOWING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")
# The fields of a model's configuration that make up its shape.
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
# Ranges of transformers' own keys; numpy takes seeds of 32 bits.
_AT_LEAST_0 = "eval_steps eval_delay max_grad_norm learning_rate weight_decay adam_beta1 adam_beta2"
_RANGES = {
    **{name: {"least": 1} for name in ("save_total_limit", "dataloader_prefetch_factor", "ddp_timeout")},
    **{name: {"least": 0} for name in ("adam_epsilon", "dataloader_num_workers", *_AT_LEAST_0.split())},
    **{"seed": {"least": 0, "most": 2**32 - 1}, "save_steps": {"above": 0}},
    **{"num_train_epochs": {"above": 0, "most": 1_000_000}, "ddp_bucket_cap_mb": {"least": 1}},
}
# A rule of a key, when it holds, and how it reads.
_LIMITS = (
    *(("least", operator.ge, "at least"), ("most", operator.le, "at most")),
    *(("above", operator.gt, "more than"), ("below", operator.lt, "less than")),
)
# Options of torch.utils.checkpoint, other than one that would draw other dropout when layers are computed again.
_CHECKPOINT_OPTIONS = ("use_reentrant", "determinism_check", "debug", "early_stop")
_MODEL_FIELDS = (*(each.name for each in fields(F2LLMConfig)), "family")
_MAPPINGS = (
    "model_config",
    "builder_options",
    "source_caps",
    "learning_rate_by_size",
    "prune_to",
    "quantized",
    "activation_checkpointing_kwargs",
)


def check_ranges(args: Any) -> None:
    """Refuse values outside of the range or the choices of their key, and numbers that are not finite."""
    for each in fields(args):
        value, rules = getattr(args, each.name), _RANGES.get(each.name, each.metadata.get("rules", {}))
        if value is None:
            continue
        # With an infinite max_grad_norm, gradients are only measured.
        if isinstance(value, float) and not (math.isfinite(value) or (value, each.name) == (math.inf, "max_grad_norm")):
            raise UserError(f"key {each.name!r} must be a finite number, got {value}")
        for rule, holds, words in _LIMITS:
            if rule in rules and not holds(value, rules[rule]):
                raise UserError(f"key {each.name!r} must be {words} {rules[rule]}, got {value}")
        choices = rules.get("choices")
        for one in (value if isinstance(value, list) else [value]) if choices else ():
            if one not in choices:
                raise UserError(f"key {each.name!r} cannot be {one!r}; use one of {', '.join(choices)}")


def check_keys_together(args: Any) -> None:
    """Refuse keys that contradict each other, or have no effect beside others in any stage."""
    _check_names(args)
    for names, needed, is_there in _needs(args):
        for name in names.split():
            if getattr(args, name) and not is_there:
                raise UserError(f"key {name!r} has no effect without '{needed}'; give that, or take the key out")
    for wrong, message in _faults(args):
        if wrong:
            raise UserError(message)


def _check_names(args: Any) -> None:
    """Refuse unknown names in mappings, and mappings, templates and addresses that cannot be read."""
    # Those whose names are checked elsewhere must at least be mappings.
    mappings = {name: args.mapping(name) for name in _MAPPINGS}
    for name, known in (
        *(("model_config", _MODEL_FIELDS), ("activation_checkpointing_kwargs", _CHECKPOINT_OPTIONS)),
        ("quantized", PRECISIONS),
    ):
        for each in mappings[name].keys() - {*known}:
            raise unknown_key(f"key {name!r}", each, known)
    if args.model_family is not None and args.model_family.lower() not in FAMILY:
        raise unknown_key("key 'model_family'", args.model_family, list(FAMILY))
    for pattern, cap in mappings["source_caps"].items():
        # 1e4 is a number with a fraction to YAML and JSON.
        if not isinstance(cap, int | float) or isinstance(cap, bool) or cap < 1 or cap != int(cap):
            raise UserError(f"key 'source_caps': the cap of {pattern!r} must be a positive integer, got {cap!r}")
    for size, rate in mappings["learning_rate_by_size"].items():
        try:
            fits = float(size) > 0 and float(rate) >= 0
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise UserError(f"key 'learning_rate_by_size' maps numbers of parameters to rates, got {size!r}: {rate!r}")
    for precision, weight in mappings["quantized"].items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise UserError(f"key 'quantized': the factor of {precision!r} must be a number from 0 on, got {weight!r}")
    # Checks the two templates.
    _ = args.text_format
    read_executor(args.executor)
    if args.push_checkpoints is not None:
        check_repository(args.push_checkpoints, "key 'push_checkpoints'")


def _needs(a: Any) -> list[tuple[str, str, Any]]:
    """Return keys, what they need, and whether it is there."""
    of_teacher = "teacher_cache_dir teacher_projection teacher_query_template teacher_document_template"
    evaluates, patience = a.eval_strategy != "no", "early_stopping_patience"
    return [
        ("builder_options", "builder", a.builder or not a.mapping("builder_options")),
        (of_teacher, "teacher", a.teacher),
        ("teacher_temperature", "score_distillation_weight: 1", a.score_distillation_weight),
        ("importance", "prune_to", a.prune_to),
        ("columns elsewhere replay replay_data", "data: FILE", a.data),
        ("replay_data", "replay: SHARE", a.replay),
        ("miner reranker", "mine: true", a.mine),
        (" ".join(a.lora_keys), "lora: true", a.lora),
        ("model_family", "model", a.model),
        ("fsdp_config", "fsdp: true", a.fsdp),
        # These read the keys of Adam.
        ("optim_args", "optim: OPTIMIZER", not a.optim.value.startswith(("adamw_torch", "adafactor"))),
        ("dataloader_persistent_workers", "dataloader_num_workers: 2", a.dataloader_num_workers),
        # Some keys may stand for all stages of a recipe, of which only some have pairs or checkpoints.
        ("evaluation_sample", "eval_strategy: epoch", evaluates or not a.evaluation_pairs or a.prunes),
        ("push_checkpoints", "save_strategy: epoch", a.save_strategy != "no" or a.prunes),
        ("early_stopping_threshold", f"{patience}: 5", getattr(a, patience)),
        (patience, "metric_for_best_model: loss", a.metric_for_best_model),
        (patience, "eval_strategy: epoch", evaluates),
    ]


def _faults(a: Any) -> list[tuple[Any, str]]:
    """Return whether something is wrong, and the message then."""
    cut, tokens = "keys 'prune_to' and 'trim_vocabulary' cut a model", a.max_tokens_per_forward or math.inf
    no_pairs = a.chooses_by_pairs and not (a.evaluation_pairs and a.evaluation_sample)
    saves_nothing = a.save_strategy == "best" and a.eval_strategy == "no" and not a.prunes
    metric = a.metric_for_best_model
    adapter = "key 'push_checkpoints': those of a stage with 'lora' hold an adapter alone; publish the finished adapter"
    # It would cut the gradient of the states in between.
    reentrant = "key 'exit_layers' cannot be trained with activation_checkpointing_kwargs: {use_reentrant: true}"
    losses = [name for name, used in (a.liger_kernel_config or {}).items() if used and name.endswith("cross_entropy")]
    return [
        (a.max_steps < 1 and a.max_steps != -1, f"key 'max_steps' must be at least 1 or -1, got {a.max_steps}"),
        (tokens < a.max_length, f"key 'max_tokens_per_forward': give at least 'max_length' ({a.max_length})"),
        (a.fp16 and a.device.type == "cpu", "key 'fp16' has no effect on a CPU; give 'bf16: true', or take it out"),
        (a.use_liger_kernel and not is_liger_kernel_available(), "key 'use_liger_kernel': 'pip install liger-kernel'"),
        (a.exit_layers and (a.activation_checkpointing_kwargs or {}).get("use_reentrant"), reentrant),
        (losses, f"key 'liger_kernel_config': an embedding model has no {losses}; give false"),
        (a.compile and a.lora_dropout, "key 'lora_dropout' draws differently in compiled layers; take 'compile' out"),
        (a.compile and a.lora_dora, "key 'compile': torch compiles DoRA again for every layer; take it out"),
        (a.prunes and a.model is None, f"{cut}; give it as 'model'"),
        (a.prunes and a.lora, f"{cut} and train nothing; take 'lora' out"),
        (min(a.embedding_ranks or [1]) < 1, f"key 'embedding_ranks': {a.embedding_ranks} must be at least 1 each"),
        (a.lora and a.embedding_ranks, "key 'embedding_ranks': an adapter trains no token embeddings; take 'lora' out"),
        (a.lora and a.model is None, "key 'lora' trains an adapter of an existing model; give it as 'model'"),
        (a.mine and not (a.miner or a.model), "key 'mine': a new model finds no negatives; give another as 'miner'"),
        (a.tokenizer == "train" and a.model is not None, "key 'tokenizer': 'model' needs its own; leave the key out"),
        ((a.model is None) == (a.model_config is None), "give exactly one of the keys 'model' and 'model_config'"),
        (no_pairs, f"key 'metric_for_best_model': {metric!r} needs 'evaluation_pairs' and 'evaluation_sample'"),
        (saves_nothing, "key 'save_strategy: best' saves nothing without evaluations; give 'eval_strategy: epoch'"),
        (a.push_checkpoints and a.lora, adapter),
    ]


def unread_keys(args: Any, given: Collection[str]) -> Iterator[str]:
    """Yield a line for each given key that has no effect beside the others, with the line that gives it one.

    These are no errors: a recipe gives keys to all of its stages, and the command line to all that run.
    """
    schedule, optimizer, pairs = args.lr_scheduler_type.value, args.optim.value, args.evaluation_pairs is not None
    adam, warms = "adam" in optimizer or "lion" in optimizer, schedule not in ("constant", *FOLLOWING_SCHEDULERS)
    chooses = args.load_best_model_at_end or args.save_strategy == "best" or args.early_stopping_patience is not None
    follows, narrows = chooses or schedule in FOLLOWING_SCHEDULERS, args.matryoshka_dimensions is None
    recomputes = "activation_checkpointing_kwargs gradient_checkpointing_kwargs"
    rules = (
        ("warmup_steps", warms, "lr_scheduler_type: constant_with_warmup"),
        ("num_train_epochs", args.max_steps < 1, "max_steps: -1"),
        ("optim_target_modules", optimizer.startswith(("galore", "apollo")), "optim: apollo_adamw"),
        ("lr_scheduler_kwargs", not schedule.startswith("constant"), "lr_scheduler_type: TYPE"),
        ("adam_beta1 adam_beta2 adam_epsilon", adam, "optim: adamw_torch"),
        ("eval_steps", args.eval_strategy == "steps", "eval_strategy: steps"),
        ("eval_delay", args.eval_strategy != "no", "eval_strategy: steps"),
        ("save_steps", args.save_strategy == "steps", "save_strategy: steps"),
        ("save_total_limit", args.save_strategy != "no", "save_strategy: steps"),
        ("logging_steps", args.logging_strategy == "steps", "logging_strategy: steps"),
        ("metric_for_best_model greater_is_better", follows, "load_best_model_at_end: true"),
        ("evaluation_candidates evaluation_sample", pairs, "evaluation_pairs: FILE"),
        ("evaluation_sample_candidates", args.evaluation_sample, "evaluation_sample: NUMBER"),
        ("tokenizer_vocab_size", args.tokenizer == "train", "tokenizer: train"),
        ("document_instruction_share", args.instructions, "instructions: true"),
        ("matryoshka_dimensions matryoshka_min_dim", args.matryoshka, "matryoshka: true"),
        ("matryoshka_min_dim", not args.matryoshka or narrows, "matryoshka_dimensions: null"),
        ("calibration_texts prune_hidden prune_layers", args.prunes, "prune_to: SHAPE"),
        ("distillation_weight", args.teacher is not None, "teacher: MODEL"),
        ("teacher_projection", args.distillation_weight > 0, "distillation_weight: 1"),
        ("teacher push_checkpoints mine exit_layers embedding_ranks", not args.prunes, "prune_to: null"),
        ("mine", args.num_hard_negatives_retrieval or args.prunes, "num_hard_negatives_retrieval: 7"),
        (recomputes, args.activation_checkpointing, "activation_checkpointing: true"),
        ("liger_kernel_config", args.use_liger_kernel, "use_liger_kernel: true"),
    )
    for names, read, line in rules:
        for name in names.split():
            if name in given and not read:
                yield f"key {name!r} has no effect without '{line}'"
