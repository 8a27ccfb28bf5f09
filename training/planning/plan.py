"""What a stage would do, before it does it: steps, tokens, memory, and time from a short measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.common.units import duration, operations, size
from training.config.arguments import StageArguments
from training.config.inputs import Input
from training.config.recipe import Stage, made_by
from training.data.prepared import PreparedSource
from training.distillation.teacher_pass import TeacherPass, teacher_pass
from training.models.adapter import adapter_config
from training.models.model_size import count_parameters
from training.planning.counting import Batches, count_batches, estimate_batches
from training.planning.data_sizes import estimated_sizes, why_not_at_hand
from training.planning.flops import StageFlops, stage_flops
from training.planning.measure import Measurement, measure_stage
from training.planning.memory import MemoryEstimate, count_adapter, estimate_memory
from training.planning.origin import Origin, origin_of, teacher_config
from training.planning.plan_pruning import PruningStagePlan, plan_pruning
from training.planning.plan_text import input_lines
from training.stages.setup import prepare_sources, read_sources
from training.trainer.contrasts import check_contrasts, warn_of_single_rows

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class Data:
    """A stage's data: counted, or estimated where it is not at hand.

    Attributes:
        said: What and where it is, in words.
        rows: Training rows.
        sources: Number of sources.
        training: The batches of an epoch.
        validation: Those of an evaluation.
        prepared: The prepared sources; None if all this is estimated.
    """

    said: str
    rows: int
    sources: int
    training: Batches
    validation: Batches
    prepared: list[PreparedSource] | None = None


@dataclass(frozen=True)
class Plan:
    """What a stage would do.

    Attributes:
        name: The stage's name.
        inputs: What it reads that other stages may make.
        output: The folder of the model that it makes.
        data: What it trains on.
        parameters: Parameters of the model.
        adapter: Those of the adapter that is trained in their stead; 0 if the model is.
        steps: Optimizer steps of the whole stage.
        evaluations: Evaluations of the whole stage.
        checkpoints: Checkpoints of the whole stage.
        may_end_early: Whether all of these are the most that there can be.
        pairs: Pairs found at each evaluation; not among tokens, operations and time.
        memory: What a step needs of one device.
        flops: Operations of the whole stage over all devices.
        cache: The teacher's pass over all texts, if its embeddings are to be kept; not among the operations.
        measured: Ten steps, if they were run.
        origin: What a later stage starts from.
    """

    name: str
    inputs: Sequence[Input]
    output: str
    data: Data
    parameters: int
    adapter: int
    steps: int
    evaluations: int
    checkpoints: int
    may_end_early: bool
    pairs: int
    memory: MemoryEstimate
    flops: StageFlops
    cache: TeacherPass | None
    measured: Measurement | None
    origin: Origin

    @property
    def rows(self) -> int:
        """Training rows of the stage's sources."""
        return self.data.rows

    @property
    def training(self) -> Batches:
        """The batches of an epoch."""
        return self.data.training

    @property
    def validation(self) -> Batches:
        """The batches of an evaluation."""
        return self.data.validation

    @property
    def seconds(self) -> float | None:
        """Time of the whole stage, once it is measured: teacher's pass, steps, evaluations and checkpoints."""
        if self.measured is None:
            return None
        return (
            self.measured.warm_up
            + (self.cache.student_tokens * self.measured.seconds_per_token if self.cache else 0.0)
            + self.steps * self.measured.step_seconds(self.training.tokens)
            + self.evaluations * self.validation.count * self.validation.tokens * self.measured.seconds_per_token
            + (self.checkpoints + 1) * self.measured.checkpoint
        )

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        batches, memory, flops = self.training, self.memory, self.flops
        about = "about " if self.data.prepared is None else ""
        yield (
            f"stage {self.name}: {about}{self.rows:,} rows of {self.data.sources:,} sources, "
            f"{self.parameters:,} parameters{f', frozen; {self.adapter:,} of an adapter' if self.adapter else ''}"
        )
        yield from input_lines(self.inputs, self.data.said, self.output)
        ends = ", fewer if it is stopped early" if self.may_end_early else ""
        yield f"  steps        {about}{self.steps:,} ({batches.count:,} an epoch){ends}"
        yield (
            f"  tokens       {about}{self.steps * batches.tokens:,.0f}; a step has {batches.tokens:,.0f} in "
            f"{batches.texts:,.0f} distinct texts, {batches.chunks:.1f} chunks on each process"
        )
        pairs = f" (up to {self.pairs:,} pairs in each, not counted here)" if self.pairs else ""
        yield f"  evaluations  {self.evaluations:,}{pairs}, checkpoints {self.checkpoints:,}"
        yield (
            f"  memory       {about}{size(memory.total)} on each device: {size(memory.state)} weights, gradients, "
            f"optimizer; {size(memory.activations)} activations of {batches.most_chunk_tokens:,} tokens; "
            f"{size(memory.loss)} embeddings; {size(memory.program)} the program"
            + (f"; {size(memory.teacher)} teacher" if memory.teacher else "")
        )
        yield (
            f"  FLOPs        about {operations(flops.total)}: {flops.steps:.3g} steps, {flops.teacher:.3g} teacher, "
            f"{flops.evaluations:.3g} evaluations"
        )
        if self.cache is not None:
            yield f"  cache        the teacher {self.cache.described()}"
        if self.measured is not None and self.seconds is not None:
            rate = batches.tokens / self.measured.step_seconds(batches.tokens)
            yield f"  measured     {rate:,.0f} tokens a second, {size(self.measured.peak_bytes)} at most in use"
            yield f"  time         {duration(self.seconds)}"


def make_plan(
    stage: Stage, earlier: Mapping[str, Origin], measure: bool = False, inputs: Sequence[Input] = ()
) -> Plan | PruningStagePlan:
    """Plans a stage: prepares its data, which the run will use again, and counts; estimates where it is not at hand.

    Data is at hand if its files are in a local folder, or a builder makes them, and the tokenizer can be loaded.
    Otherwise rows are those that the manifest says were published, under the caps, and texts are taken to have
    ``planned_text_tokens`` each; nothing remote is listed or fetched.

    Args:
        stage: The stage.
        earlier: What earlier stages of the recipe would make, by folder.
        measure: Whether to run ten steps for their time and memory; not of a stage that cuts a model.
        inputs: What the stage reads that other stages may make.

    Raises:
        UserError: If something the user gave is faulty, or there is nothing to count or estimate from.
    """
    args = stage.arguments
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        if args.prunes:
            return plan_pruning(stage, earlier, inputs)
        away = why_not_at_hand(args)
        all_sources, selected = read_sources(args) if away is None else (None, [])
        check_contrasts(args, selected)
        origin = origin_of(args, earlier, all_sources)
        teacher = teacher_config(args, earlier, inputs)
        args.train_dims(origin.config.hidden_size)
        adapter = adapter_config(args)
        if away is None and origin.tokenizer is not None:
            data = _counted(args, prepare_sources(stage, selected, origin.tokenizer))
        else:
            data = _estimated(args, away or f"the tokenizer of {args.model} is not at hand")
    if measure and data.prepared is None:
        raise UserError(f"stage {stage.name!r} cannot be measured: {data.said}; take --measure out")
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * data.training.count)
    evaluations = _occasions(args.eval_strategy, args.eval_steps, steps, data.training.count)
    return Plan(
        name=stage.name,
        inputs=inputs,
        output=made_by(stage),
        data=data,
        parameters=count_parameters(origin.config),
        adapter=0 if adapter is None else count_adapter(origin.config, adapter),
        steps=steps,
        evaluations=evaluations,
        checkpoints=_occasions(args.save_strategy, args.save_steps, steps, data.training.count),
        may_end_early=args.early_stopping_patience is not None,
        pairs=args.evaluation_sample,
        memory=_memory(args, origin.config, teacher, data.training, adapter),
        flops=stage_flops(args, origin.config, teacher, steps, data.training, data.validation, evaluations),
        cache=teacher_pass(args, origin.config, teacher, data.prepared),
        measured=_measured(stage, origin, data, teacher) if measure else None,
        origin=origin,
    )


def _counted(args: StageArguments, prepared: list[PreparedSource]) -> Data:
    check_contrasts(args, prepared)
    warn_of_single_rows(args, prepared)
    return Data(
        said=f"{args.manifest}, there",
        rows=sum(len(source.rows["train"]) for source in prepared),
        sources=len(prepared),
        training=count_batches(args, prepared, "train"),
        validation=count_batches(args, prepared, "validation"),
        prepared=prepared,
    )


def _estimated(args: StageArguments, why: str) -> Data:
    sizes = estimated_sizes(args)
    rows = sum(sum(each.rows) for each in sizes)
    known = "published" if any(each.published for each in sizes) else "counted"
    length = min(args.planned_text_tokens, args.max_length)
    return Data(
        said=f"{why}: estimated from {rows:,.0f} {known} rows, the caps applied; assumed that every text is distinct "
        f"and has {length} tokens (planned_text_tokens)",
        rows=round(rows * (1 - args.validation_share)),
        sources=sum(len(each.rows) for each in sizes),
        training=estimate_batches(args, sizes, 1 - args.validation_share),
        validation=estimate_batches(args, sizes, args.validation_share),
    )


def _memory(
    args: StageArguments,
    config: F2LLMConfig,
    teacher: F2LLMConfig | None,
    training: Batches,
    adapter: LoraConfig | None,
) -> MemoryEstimate:
    return estimate_memory(
        config,
        training.most_chunk_tokens,
        training.most_texts,
        args.bf16,
        args.activation_checkpointing,
        # One whose embeddings are kept is gone before the first step.
        teacher if args.teacher_cache_dir is None else None,
        args.world_size,
        sharded=bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        adapter=adapter,
    )


def _measured(stage: Stage, origin: Origin, data: Data, teacher: F2LLMConfig | None) -> Measurement:
    return measure_stage(stage, origin.config, data.prepared, origin.tokenizer, teacher)


def _occasions(strategy: str, every: float, steps: int, steps_per_epoch: int) -> int:
    """How often something happens that is due every so many steps, or at the end of an epoch."""
    if strategy == "epoch":
        return math.ceil(steps / steps_per_epoch)
    if strategy != "steps":
        return 0
    # A number below one is a share of all steps; what is due at intervals is done at the last step too.
    return math.ceil(steps / (math.ceil(every * steps) if every < 1 else int(every)))
