"""The weights that a model of a configuration has, to compare with those of a folder, which need not be read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel


def wrong_weight(shapes: Mapping[str, tuple[int, ...]], config: F2LLMConfig) -> str | None:
    """The first weight that is not as a configuration wants it, missing or one too many, and how; None if all are.

    Args:
        shapes: Of the weights there are, by name.
        config: The model's configuration.
    """
    # Of this thread alone: a training may make modules in another one meanwhile.
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in F2LLMModel(config).named_parameters()}
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            has, wants = (each.get(name, "absent") for each in (shapes, expected))
            return f"weight {name} is {has}, the configuration wants {wants}"
    return None
