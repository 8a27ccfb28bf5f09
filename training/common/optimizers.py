"""The options of an optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# What a stage says of a group of weights. Other entries of a group may be states of the optimizer.
_OPTIONS = ("betas", "eps", "weight_decay")


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Learning rate, betas, epsilon and decay of each group of weights of an optimizer that was just made."""
    return [{key: group[key] for key in ("lr", *_OPTIONS) if key in group} for group in optimizer.param_groups]


def apply_options(optimizer: torch.optim.Optimizer, options: Sequence[dict[str, Any]]) -> None:
    """Gives the groups of weights the options of the stage, but for the learning rate, which the schedule sets."""
    for group, own in zip(optimizer.param_groups, options, strict=False):
        group.update({key: own[key] for key in _OPTIONS if key in own and key in group})
