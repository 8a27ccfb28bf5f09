"""Checks of a stage's keys: ranges, and keys that contradict each other or have no effect beside others."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from itertools import chain
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
_PAIRS = "evaluation_pairs: FILE"


def check_finite(args: Any) -> None:
    """Refuse numbers that are not finite and integers of more than 64 bits, also in lists and mappings."""
    for each in fields(args):
        for number in _numbers(getattr(args, each.name, None)):
            if number == math.inf and each.name in _MAY_BE_INFINITE:
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"key {each.name!r} must be a finite number, got {number}")
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise UserError(f"key {each.name!r} must fit in 64 bits, got {number}")


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
    faults = chain(_faults_of_numbers(args), _faults_of_computation(args), _faults_of_task(args))
    if (message := next(faults, None)) is not None:
        raise UserError(message)


def _check_names(args: Any) -> None:
    """Refuse unknown names in mappings, and mappings and templates that cannot be read."""
    # Those whose names are checked elsewhere must at least be mappings.
    mappings = {name: args.mapping(name) for name in _MAPPINGS}
    for name, known in (("model_config", _MODEL_FIELDS), ("activation_checkpointing_kwargs", _CHECKPOINT_OPTIONS)):
        for each in mappings[name].keys() - {*known}:
            of = " (fields of F2LLMConfig)" if known is _MODEL_FIELDS else ""
            raise unknown_key(f"key {name!r}{of}", each, known)
    if args.model_family is not None and args.model_family.lower() not in FAMILY:
        raise unknown_key("key 'model_family'", args.model_family, list(FAMILY))
    for pattern, cap in mappings["source_caps"].items():
        # 1e4 is a number with a fraction to YAML and JSON.
        whole = isinstance(cap, float) and cap.is_integer()
        if not (isinstance(cap, int) or whole) or isinstance(cap, bool) or cap < 1:
            raise UserError(f"key 'source_caps': the cap of {pattern!r} must be a positive integer, got {cap!r}")
    # Checks the two templates.
    _ = args.text_format
    if args.push_checkpoints is not None:
        try:
            check_repository(args.push_checkpoints)
        except UserError as error:
            raise UserError(f"key 'push_checkpoints': {str(error).removeprefix('--repo ')}") from None


def _needs(a: Any) -> list[tuple[str, str, Any, str]]:
    """Return keys, what they need, whether it is there, and the remedy."""
    of_teacher = "teacher_cache_dir teacher_projection teacher_query_template teacher_document_template"
    metric, never = a.metric_for_best_model, a.eval_strategy == "no"
    # Some keys may stand for all stages of a recipe, of which only some have pairs or checkpoints.
    sampled, saved = not (a.evaluation_pairs and never and not a.prunes), a.prunes or a.save_strategy != "no"
    patience, add = "early_stopping_patience", "give that, too, as in"
    return [
        ("builder_options", "'builder'", a.builder or not a.builder_fields(), "name the builder or take it out"),
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


def _faults_of_numbers(a: Any) -> Iterator[str]:
    if not a.temperature > 0:
        yield f"key 'temperature' must be positive, got {a.temperature}"
    if a.distillation_weight < 0:
        yield f"key 'distillation_weight' must not be negative, got {a.distillation_weight}"
    if not 0 < a.num_train_epochs <= _MOST_EPOCHS:
        yield (
            f"key 'num_train_epochs' must be more than 0 and at most {_MOST_EPOCHS}, got {a.num_train_epochs}; "
            "give 'num_train_epochs: 1', a part of an epoch as a fraction, or 'max_steps'"
        )
    if a.max_steps < 1 and a.max_steps != -1:
        yield f"key 'max_steps' must be at least 1, got {a.max_steps}; take it out to train by 'num_train_epochs'"
    if not a.save_steps > 0:
        yield f"key 'save_steps' must be more than 0, got {a.save_steps}; for no checkpoints give 'save_strategy: no'"
    if a.lora_dropout is not None and not 0 <= a.lora_dropout < 1:
        yield f"key 'lora_dropout' must lie between 0 and 1, got {a.lora_dropout}"
    if (tokens := a.max_tokens_per_forward) is not None and tokens < a.max_length:
        yield (
            f"key 'max_tokens_per_forward' ({tokens}) must hold the longest text; give at least 'max_length' "
            f"({a.max_length})"
        )


def _faults_of_computation(a: Any) -> Iterator[str]:
    if a.fp16 and a.device.type == "cpu":
        yield "key 'fp16' has no effect on a CPU; give 'bf16: true', or take it out"
    if a.use_liger_kernel and not is_liger_kernel_available():
        yield "key 'use_liger_kernel' needs a package; 'pip install liger-kernel', or take the key out"
    for kernel in ("cross_entropy", "fused_linear_cross_entropy"):
        if (a.liger_kernel_config or {}).get(kernel):
            yield f"key 'liger_kernel_config': an embedding model has no {kernel!r}; give false"
    if a.dataloader_persistent_workers and not a.dataloader_num_workers:
        yield "key 'dataloader_persistent_workers' needs workers; give 'dataloader_num_workers: 2', or take it out"
    if a.optim_args is not None and (optimizer := a.optim.value).startswith(_WITHOUT_OPTIONS):
        yield (
            f"key 'optim_args' has no effect on 'optim: {optimizer}'; give 'adam_beta1', 'adam_epsilon' and "
            "'weight_decay', or take it out"
        )
    if (counted := a.include_num_input_tokens_seen) not in ("all", "no"):
        yield f"key 'include_num_input_tokens_seen' cannot be {counted!r}; give 'all', 'non_padding' or 'no'"
    if a.compile and a.lora_dropout:
        yield "key 'lora_dropout' cannot be drawn twice the same in compiled layers; take 'compile' out"
    if a.compile and a.lora_dora:
        yield "key 'compile': torch compiles DoRA again for every layer, up to its limit; take it out"


def _faults_of_task(a: Any) -> Iterator[str]:
    cut = "keys 'prune_to' and 'trim_vocabulary' cut a model"
    if a.prunes and a.model is None:
        yield f"{cut}; give it as 'model'"
    if a.prunes and a.lora:
        yield f"{cut} and train nothing; take 'lora' out"
    if a.prunes and a.teacher:
        yield "key 'teacher' has no effect in a stage that cuts a model; give it to the stage that trains the result"
    if a.lora and a.model is None:
        yield "key 'lora' trains an adapter of an existing model; give it as 'model'"
    if a.tokenizer == "train" and a.model is not None:
        yield "key 'tokenizer': a model that is trained already needs its own; leave the key out"
    if (a.model is None) == (a.model_config is None):
        yield "give exactly one of the keys 'model' (what to start from) and 'model_config' (a new model)"
    if a.chooses_by_pairs and not (a.evaluation_pairs and a.evaluation_sample):
        yield (
            f"key 'metric_for_best_model': {a.metric_for_best_model!r} is measured on pairs; give 'evaluation_pairs' "
            "and 'evaluation_sample', the number of pairs, as in 'evaluation_sample: 500'"
        )
    if a.save_strategy == "best" and a.eval_strategy == "no" and not a.prunes:
        yield "key 'save_strategy: best' saves nothing without evaluations; give 'eval_strategy: epoch'"
    if a.push_checkpoints and a.lora:
        yield (
            "key 'push_checkpoints': checkpoints of a stage with 'lora' hold an adapter alone, which cannot be a "
            "revision of a model; leave it out, and merge and publish the finished adapter"
        )


def unread_keys(args: Any, given: Collection[str]) -> Iterator[str]:
    """Yield a line for each given key that has no effect beside the others, with the line that gives it one.

    These are no errors: a recipe gives keys to all of its stages, and the command line to all that run.
    """
    schedule, optimizer = args.lr_scheduler_type.value, args.optim.value
    adam = "adam" in optimizer or "lion" in optimizer
    chooses = args.load_best_model_at_end or args.save_strategy == "best" or args.early_stopping_patience is not None
    rules = (
        (
            "warmup_steps",
            schedule not in ("constant", *FOLLOWING_SCHEDULERS),
            "lr_scheduler_type: constant_with_warmup",
        ),
        ("num_train_epochs", args.max_steps < 1, "max_steps: -1"),
        ("optim_target_modules", optimizer.startswith(("galore", "apollo")), "optim: apollo_adamw"),
        ("lr_scheduler_kwargs", not schedule.startswith("constant"), "lr_scheduler_type: TYPE"),
        ("adam_beta1 adam_beta2 adam_epsilon", adam, "optim: adamw_torch"),
        ("eval_steps", args.eval_strategy == "steps", "eval_strategy: steps"),
        ("eval_delay", args.eval_strategy != "no", "eval_strategy: steps"),
        ("save_steps", args.save_strategy == "steps", "save_strategy: steps"),
        ("save_total_limit", args.save_strategy != "no", "save_strategy: steps"),
        ("logging_steps", args.logging_strategy == "steps", "logging_strategy: steps"),
        (
            "metric_for_best_model greater_is_better",
            chooses or schedule in FOLLOWING_SCHEDULERS,
            "load_best_model_at_end: true",
        ),
        ("evaluation_candidates evaluation_sample", args.evaluation_pairs is not None, _PAIRS),
        ("evaluation_sample_candidates", args.evaluation_sample, "evaluation_sample: NUMBER"),
        ("tokenizer_vocab_size", args.tokenizer == "train", "tokenizer: train"),
        ("document_instruction_share", args.instructions, "instructions: true"),
        ("matryoshka_dimensions matryoshka_min_dim", args.matryoshka, "matryoshka: true"),
        (
            "matryoshka_min_dim",
            not args.matryoshka or args.matryoshka_dimensions is None,
            "matryoshka_dimensions: null",
        ),
        ("calibration_texts prune_hidden prune_layers", args.prunes, "prune_to: SHAPE"),
        ("distillation_weight", args.teacher is not None, "teacher: MODEL"),
        (
            "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
            args.activation_checkpointing,
            "activation_checkpointing: true",
        ),
        ("liger_kernel_config", args.use_liger_kernel, "use_liger_kernel: true"),
    )
    for names, read, line in rules:
        for name in names.split():
            if name in given and not read:
                yield f"key {name!r} has no effect without '{line}'"
