"""What the numbers of a stage may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from training.common.errors import UserError

# A byte-level tokenizer has 256 bytes and three special tokens.
_FEWEST_TOKENS = 259
_LEAST = {
    **dict.fromkeys(("max_length", "matryoshka_min_dim", "cap", "global_batch_size", "save_total_limit"), 1),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb"), 1),
    **dict.fromkeys(("dataloader_num_workers", "logging_steps", "eval_steps", "eval_delay", "max_grad_norm"), 0),
    **dict.fromkeys(("learning_rate", "weight_decay"), 0),
    "tokenizer_vocab_size": _FEWEST_TOKENS,
}
# A share of all, and what numpy takes for a seed.
_BETWEEN = {"validation_share": (0, 1), "document_instruction_share": (0, 1), "seed": (0, 2**32 - 1)}
# Without end: gradients are not clipped, only measured.
_MAY_BE_INFINITE = ("max_grad_norm",)
_MOST_EPOCHS = 1_000_000


def check_finite(arguments: Any) -> None:
    """Refuses numbers, also those in lists and mappings, that are not finite, and integers of more than 64 bits.

    Raises:
        UserError: If there is one.
    """
    for each in fields(arguments):
        for number in _numbers(getattr(arguments, each.name, None)):
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


def check_ranges(arguments: Any) -> None:
    """Refuses numbers that no training could use.

    Raises:
        UserError: If there is one.
    """
    for key, least in _LEAST.items():
        value = getattr(arguments, key)
        if value is not None and value < least:
            raise UserError(f"key {key!r} must be at least {least}, got {value}")
    for key, (least, most) in _BETWEEN.items():
        value = getattr(arguments, key)
        if not least <= value <= most:
            raise UserError(f"key {key!r} must lie between {least} and {most}, got {value}")
    for task_type, count in arguments.num_hard_negatives.items():
        if count < 0:
            raise UserError(f"key 'num_hard_negatives_{task_type}' must not be negative, got {count}")
    if not arguments.temperature > 0:
        raise UserError(f"key 'temperature' must be positive, got {arguments.temperature}")
    if not 0 < arguments.num_train_epochs <= _MOST_EPOCHS:
        raise UserError(
            f"key 'num_train_epochs' must be more than 0 and at most {_MOST_EPOCHS}, got {arguments.num_train_epochs}; "
            "give 'num_train_epochs: 1', a part of an epoch as a fraction, or 'max_steps'"
        )
    if arguments.max_steps < 1 and arguments.max_steps != -1:
        raise UserError(
            f"key 'max_steps' must be at least 1, got {arguments.max_steps}; take it out to train by 'num_train_epochs'"
        )
    if not arguments.save_steps > 0:
        raise UserError(
            f"key 'save_steps' must be more than 0, got {arguments.save_steps}; give 'save_strategy: no' to write no "
            "checkpoints"
        )
