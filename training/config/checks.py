"""Checks of a stage's keys: ranges, and keys that contradict each other or have no effect beside others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from transformers.utils import is_liger_kernel_available

from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.common.errors import UserError
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
_LEAST = {
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb"), 1),
    **dict.fromkeys(("dataloader_num_workers", "eval_steps", "eval_delay", "max_grad_norm", "seed"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay"), 0),
}
_MOST = {"seed": 2**32 - 1}
# Infinity: gradients are not clipped, only measured.
_MAY_BE_INFINITE = ("max_grad_norm",)
_MOST_EPOCHS = 1_000_000
# Options of torch.utils.checkpoint, other than one that would draw other dropout when layers are computed again.
_CHECKPOINT_OPTIONS = ("use_reentrant", "determinism_check", "debug", "early_stop")
_MODEL_FIELDS = (*(each.name for each in fields(F2LLMConfig)), "family")
_MAPPINGS = ("model_config", "builder_options", "source_caps", "prune_to", "activation_checkpointing_kwargs")
# Optimizers that read the keys of Adam, but no options.
_WITHOUT_OPTIONS = ("adamw_torch", "adafactor")


def check_finite(args: Any) -> None:
    """Refuse numbers that are not finite, also in lists and mappings."""
    for each in fields(args):
        for number in _numbers(getattr(args, each.name, None)):
            if not math.isfinite(number) and (number != math.inf or each.name not in _MAY_BE_INFINITE):
                raise UserError(f"key {each.name!r} must be a finite number, got {number}")


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(each)


def check_ranges(args: Any) -> None:
    """Refuse values outside of the range or the choices of their key."""
    for each in fields(args):
        value, rules = getattr(args, each.name), each.metadata.get("rules", {})
        if value is None:
            continue
        least, most = rules.get("least", _LEAST.get(each.name)), rules.get("most", _MOST.get(each.name))
        if most is not None and not least <= value <= most:
            raise UserError(f"key {each.name!r} must lie between {least} and {most}, got {value}")
        if least is not None and value < least:
            raise UserError(f"key {each.name!r} must be at least {least}, got {value}")
        if value not in (choices := rules.get("choices", [value])):
            raise UserError(f"key {each.name!r} cannot be {value!r}; use one of {', '.join(choices)}")


def check_keys_together(args: Any) -> None:
    """Refuse keys that contradict each other, or have no effect beside others in any stage."""
    _check_names(args)
    for names, needed, is_there, remedy in _needs(args):
        for name in names.split():
            if getattr(args, name) and not is_there:
                raise UserError(f"key {name!r} has no effect without {needed}; {remedy}")
    for wrong, message in (*_number_faults(args), *_computation_faults(args), *_task_faults(args)):
        if wrong:
            raise UserError(message)


def _check_names(args: Any) -> None:
    """Refuse unknown names in mappings, and mappings and templates that cannot be read."""
    # Those whose names are checked elsewhere must at least be mappings.
    mappings = {name: args.mapping(name) for name in _MAPPINGS}
    for name, known in (("model_config", _MODEL_FIELDS), ("activation_checkpointing_kwargs", _CHECKPOINT_OPTIONS)):
        for each in mappings[name].keys() - {*known}:
            raise unknown_key(f"key {name!r}", each, known)
    if args.model_family is not None and args.model_family.lower() not in FAMILY:
        raise unknown_key("key 'model_family'", args.model_family, list(FAMILY))
    for pattern, cap in mappings["source_caps"].items():
        # 1e4 is a number with a fraction to YAML and JSON.
        if not isinstance(cap, int | float) or isinstance(cap, bool) or cap < 1 or cap != int(cap):
            raise UserError(f"key 'source_caps': the cap of {pattern!r} must be a positive integer, got {cap!r}")
    # Checks the two templates.
    _ = args.text_format
    if args.push_checkpoints is not None:
        check_repository(args.push_checkpoints, "key 'push_checkpoints'")


def _needs(a: Any) -> list[tuple[str, str, Any, str]]:
    """Return keys, what they need, whether it is there, and the remedy."""
    of_teacher = "teacher_cache_dir teacher_projection teacher_query_template teacher_document_template"
    metric, never = a.metric_for_best_model, a.eval_strategy == "no"
    # Some keys may stand for all stages of a recipe, of which only some have pairs or checkpoints.
    sampled, saved = not (a.evaluation_pairs and never and not a.prunes), a.prunes or a.save_strategy != "no"
    patience, add = "early_stopping_patience", "give that, too, as in"
    return [
        (
            "builder_options",
            "'builder'",
            a.builder or not a.mapping("builder_options"),
            "name the builder or take it out",
        ),
        (of_teacher, "'teacher'", a.teacher, "name one or take the key out"),
        ("importance", "'prune_to'", a.prune_to, "give the shape or take it out"),
        (" ".join(a.lora_keys), "'lora: true'", a.lora, "add that or take the key out"),
        ("model_family", "'model'", a.model, "name the family in 'model_config'"),
        ("fsdp_config", "'fsdp: true'", a.fsdp, "add that, or take it out"),
        ("evaluation_sample", "evaluations", sampled, "give 'eval_strategy', as in 'eval_strategy: epoch'"),
        ("early_stopping_threshold", f"{patience!r}", getattr(a, patience), f"{add} '{patience}: 5'"),
        (patience, "'metric_for_best_model'", metric, f"{add} 'metric_for_best_model: loss'"),
        (patience, "'eval_strategy'", not never, f"{add} 'eval_strategy: epoch'"),
        ("push_checkpoints", "checkpoints", saved, "give 'save_strategy', as in 'save_strategy: epoch'"),
    ]


# Whether something is wrong, and the message then.
_Faults = list[tuple[Any, str]]


def _number_faults(a: Any) -> _Faults:
    tokens, dropout = a.max_tokens_per_forward, a.lora_dropout
    epochs = f"must be more than 0 and at most {_MOST_EPOCHS}, got {a.num_train_epochs}; give 'num_train_epochs: 1'"
    holds = f"must hold the longest text; give at least 'max_length' ({a.max_length})"
    return [
        (not a.temperature > 0, f"key 'temperature' must be positive, got {a.temperature}"),
        (not 0 < a.num_train_epochs <= _MOST_EPOCHS, f"key 'num_train_epochs' {epochs}, or 'max_steps'"),
        (a.max_steps < 1 and a.max_steps != -1, f"key 'max_steps' must be at least 1 or -1, got {a.max_steps}"),
        (not a.save_steps > 0, f"key 'save_steps' must be more than 0, got {a.save_steps}; or 'save_strategy: no'"),
        (dropout and not 0 <= dropout < 1, f"key 'lora_dropout' must lie between 0 and 1, got {dropout}"),
        (tokens is not None and tokens < a.max_length, f"key 'max_tokens_per_forward' ({tokens}) {holds}"),
    ]


def _computation_faults(a: Any) -> _Faults:
    optimizer, counted, kernels = a.optim.value, a.include_num_input_tokens_seen, a.liger_kernel_config or {}
    no_liger = a.use_liger_kernel and not is_liger_kernel_available()
    no_workers = a.dataloader_persistent_workers and not a.dataloader_num_workers
    no_options = a.optim_args is not None and optimizer.startswith(_WITHOUT_OPTIONS)
    unread = f"has no effect on 'optim: {optimizer}'; give 'adam_beta1', 'adam_epsilon' and 'weight_decay'"
    needs_workers = "needs workers; give 'dataloader_num_workers: 2', or take it out"
    return [
        (a.fp16 and a.device.type == "cpu", "key 'fp16' has no effect on a CPU; give 'bf16: true', or take it out"),
        (no_liger, "key 'use_liger_kernel' needs a package; 'pip install liger-kernel', or take the key out"),
        *(
            (kernels.get(kernel), f"key 'liger_kernel_config': an embedding model has no {kernel!r}; give false")
            for kernel in ("cross_entropy", "fused_linear_cross_entropy")
        ),
        (no_workers, f"key 'dataloader_persistent_workers' {needs_workers}"),
        (no_options, f"key 'optim_args' {unread}"),
        (
            counted not in ("all", "no"),
            f"key 'include_num_input_tokens_seen' cannot be {counted!r}; give 'all' or 'no'",
        ),
        (a.compile and a.lora_dropout, "key 'lora_dropout' draws differently in compiled layers; take 'compile' out"),
        (a.compile and a.lora_dora, "key 'compile': torch compiles DoRA again for every layer; take it out"),
    ]


def _task_faults(a: Any) -> _Faults:
    cut, best = "keys 'prune_to' and 'trim_vocabulary' cut a model", a.metric_for_best_model
    no_pairs = a.chooses_by_pairs and not (a.evaluation_pairs and a.evaluation_sample)
    pairs = f"{best!r} is measured on pairs; give 'evaluation_pairs' and 'evaluation_sample', their number"
    saves_nothing = a.save_strategy == "best" and a.eval_strategy == "no" and not a.prunes
    alone = "hold an adapter alone; leave it out, and merge and publish the finished adapter"
    return [
        (a.prunes and a.model is None, f"{cut}; give it as 'model'"),
        (a.prunes and a.lora, f"{cut} and train nothing; take 'lora' out"),
        (a.lora and a.model is None, "key 'lora' trains an adapter of an existing model; give it as 'model'"),
        (a.tokenizer == "train" and a.model is not None, "key 'tokenizer': 'model' needs its own; leave the key out"),
        (
            (a.model is None) == (a.model_config is None),
            "give exactly one of the keys 'model' (what to start from) and 'model_config' (a new model)",
        ),
        (no_pairs, f"key 'metric_for_best_model': {pairs}"),
        (saves_nothing, "key 'save_strategy: best' saves nothing without evaluations; give 'eval_strategy: epoch'"),
        (a.push_checkpoints and a.lora, f"key 'push_checkpoints': checkpoints of a stage with 'lora' {alone}"),
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
        ("teacher push_checkpoints", not args.prunes, "prune_to: null"),
        (recomputes, args.activation_checkpointing, "activation_checkpointing: true"),
        ("liger_kernel_config", args.use_liger_kernel, "use_liger_kernel: true"),
    )
    for names, read, line in rules:
        for name in names.split():
            if name in given and not read:
                yield f"key {name!r} has no effect without '{line}'"
