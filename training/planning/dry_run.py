"""Shows what the stages of a recipe would do, before any of them does it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from training.common.units import duration, operations
from training.config.inputs import Input, find_inputs, missing_error
from training.config.recipe import Recipe, Stage, made_by
from training.evaluation.stage_pairs import load_stage_pairs
from training.planning.origin import Origin
from training.planning.plan import make_plan


def device_overrides() -> dict[str, bool]:
    """Keys that let a recipe for GPUs be planned on a machine without one: transformers refuses bf16 there."""
    return {} if torch.accelerator.is_available() else {"use_cpu": True}


def show_plans(recipe: Recipe, chosen: Sequence[Stage], measure: bool) -> None:
    """Writes the plans of stages to the standard output, each as soon as it is made.

    Raises:
        UserError: If a stage cannot be planned: something is faulty, or starts from a model of which nothing is known.
    """
    origins: dict[str, Origin] = {}
    seconds, total = 0.0, 0.0
    speaks = chosen[0].arguments.process_index == 0
    for stage in chosen:
        inputs = find_inputs(recipe, stage)
        _require_shapes(recipe, stage, inputs, origins)
        plan = make_plan(stage, origins, measure, inputs)
        # What the builder of the data makes, too, is there now; a stage that cuts a model may have built nothing.
        if not stage.arguments.prunes:
            load_stage_pairs(stage.arguments)
        origins[made_by(stage)] = plan.origin
        seconds += plan.seconds or 0.0
        total += plan.flops.total
        if speaks:
            sys.stdout.write("\n".join(plan.lines()) + "\n")
    if len(chosen) > 1 and speaks:
        sys.stdout.write(f"all stages: about {operations(total)}\n")
        if measure:
            left_out = "data preparation, pruning and evaluation of the result left out"
            sys.stdout.write(f"all stages: {duration(seconds)}, {left_out}\n")


def _require_shapes(recipe: Recipe, stage: Stage, inputs: Sequence[Input], origins: Mapping[str, Origin]) -> None:
    """Refuses a model or teacher that is missing and whose shape nothing tells."""
    for each in inputs:
        family = stage.arguments.model_family
        if each.key == "teacher":
            family = each.maker.keys.get("model_family") if each.maker is not None else None
        if each.key in ("model", "teacher") and each.missing and each.name not in origins and family is None:
            raise missing_error(recipe, stage, each)
