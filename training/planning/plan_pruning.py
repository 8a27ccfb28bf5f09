"""What a stage that cuts a model would do, before it does it: sizes before and after, memory, operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from training.common.units import operations, size
from training.config.inputs import Input
from training.config.recipe import Stage, made_by
from training.models.model_size import count_parameters, forward_flops
from training.planning.data_sizes import why_not_at_hand
from training.planning.flops import StageFlops
from training.planning.memory import MemoryEstimate, estimate_pruning_memory
from training.planning.origin import Origin, origin_of
from training.planning.plan_text import input_lines
from training.pruning.shape import pruned_config
from training.stages.setup import read_sources

# Tokens of a calibration pass that a recipe says nothing of.
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class PruningStagePlan:
    """What a stage that cuts a model would do.

    Attributes:
        name: The stage's name.
        inputs: What it reads.
        data: What it is calibrated on, in words.
        output: The folder of the model that it makes.
        before: Parameters of the model that is cut.
        after: Parameters of what stays; at most, if the vocabulary is trimmed too.
        trims: Whether it is.
        memory: What calibration and cutting need of one device.
        flops: Those of the calibration, as evaluations.
        origin: What a later stage starts from.
    """

    name: str
    inputs: Sequence[Input]
    data: str
    output: str
    before: int
    after: int
    trims: bool
    memory: MemoryEstimate
    flops: StageFlops
    origin: Origin

    @property
    def seconds(self) -> None:
        """No time is measured: cutting is short beside training."""
        return

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        after = f"{self.after:,} parameters" + (" at most: the vocabulary is trimmed" if self.trims else "")
        yield f"stage {self.name}: cuts {self.before:,} parameters to {after}"
        yield from input_lines(self.inputs, self.data, self.output)
        memory = self.memory
        yield (
            f"  memory       {size(memory.total)} on one device: {size(memory.state)} weights before and after; "
            f"{size(memory.activations)} activations; {size(memory.program)} the program"
        )
        yield f"  FLOPs        about {operations(self.flops.total)}, the calibration"


def plan_pruning(stage: Stage, earlier: Mapping[str, Origin], inputs: Sequence[Input] = ()) -> PruningStagePlan:
    """Plans a stage that cuts a model; no data is prepared.

    Args:
        stage: The stage.
        earlier: What earlier stages of the recipe would make, by folder.
        inputs: What it reads.

    Raises:
        UserError: If the shapes are not known or do not fit.
    """
    args = stage.arguments
    needs_data = args.trim_vocabulary or args.importance is None
    away = why_not_at_hand(args) if needs_data else None
    all_sources = read_sources(args)[0] if needs_data and away is None else None
    origin = origin_of(args, earlier, all_sources if needs_data else [])
    target = origin.config
    if args.prune_to is not None:
        target = pruned_config(origin.config, args.prune_to_fields(), "key 'prune_to'")
    length = min(args.planned_text_tokens, args.max_length)
    tokens = args.calibration_texts * length if args.prune_to is not None and args.importance is None else 0
    return PruningStagePlan(
        name=stage.name,
        inputs=inputs,
        data=_data(stage, needs_data, tokens, away),
        output=made_by(stage),
        before=count_parameters(origin.config),
        after=count_parameters(target),
        trims=args.trim_vocabulary,
        memory=estimate_pruning_memory(
            origin.config, target, min(tokens, args.max_tokens_per_forward or _TOKENS_AT_ONCE), args.bf16
        ),
        flops=StageFlops(evaluations=forward_flops(origin.config, tokens, tokens * length)),
        origin=Origin(target, origin.tokenizer),
    )


def _data(stage: Stage, needed: bool, tokens: int, away: str | None) -> str:
    if not needed:
        return "none: activations were measured before"
    args = stage.arguments
    parts = [f"{args.manifest}, there" if away is None else away]
    if tokens:
        length = tokens // args.calibration_texts
        parts.append(f"about {args.calibration_texts:,} texts, taken as {length} tokens each (planned_text_tokens)")
    if args.trim_vocabulary:
        parts.append("all texts are read for their tokens")
    return "; ".join(parts)
