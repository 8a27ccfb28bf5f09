"""What the stages of a recipe would do: data, steps, tokens, memory, operations and time, before any of them runs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.command import duration, operations, size
from training.common.errors import UserError, in_one_line
from training.config.arguments import StageArguments
from training.config.recipe import Input, Recipe, Stage, find_inputs, made_by, missing_error
from training.data.manifest import Source
from training.data.prepared import PreparedSource
from training.distillation.teacher_cache import TeacherPass, teacher_pass
from training.evaluation.stage_pairs import load_stage_pairs
from training.models.adapters import adapter_config
from training.models.model_folder import count_parameters, forward_flops
from training.models.model_ref import base_of
from training.planning.batches import Batches, count_batches, estimate_batches, estimated_sizes, why_not_local
from training.planning.costs import (
    Measurement,
    MemoryEstimate,
    StageFlops,
    count_adapter,
    estimate_memory,
    estimate_pruning_memory,
    measure_stage,
    stage_flops,
)
from training.pruning.shape import pruned_config
from training.stages.setup import (
    check_contrasts,
    check_max_length,
    make_config,
    make_tokenizer,
    prepare_sources,
    read_sources,
    warn_of_single_rows,
)


def device_overrides() -> dict[str, bool]:
    """Return keys with which a recipe for GPUs is planned without one, where transformers refuses bf16."""
    return {} if torch.accelerator.is_available() else {"use_cpu": True}


def show_plans(recipe: Recipe, chosen: Sequence[Stage], measure: bool) -> None:
    """Write the plans of stages to the standard output, each as soon as it is made."""
    origins: dict[str, Origin] = {}
    seconds = flops = 0.0
    for stage in chosen:
        args, inputs = stage.arguments, find_inputs(recipe, stage)
        for each in inputs:
            family = args.model_family
            if each.key == "teacher":
                family = each.maker.keys.get("model_family") if each.maker else None
            if each.key in ("model", "teacher") and each.missing and family is None and each.name not in origins:
                raise missing_error(recipe, stage, each)
        plan = make_plan(stage, origins, measure, inputs)
        # After the builder, which may make the pairs; a pruning stage may have built nothing.
        if not args.prunes:
            load_stage_pairs(args)
        origins[made_by(stage)] = plan.origin
        seconds += plan.seconds or 0.0
        flops += plan.flops.total
        lines = list(plan.lines())
        if stage is chosen[-1] and len(chosen) > 1:
            lines.append(f"all stages: about {operations(flops)}")
            if measure:
                left_out = "data preparation, pruning and evaluation of the result left out"
                lines.append(f"all stages: {duration(seconds)}, {left_out}")
        if args.process_index == 0:
            sys.stdout.write("\n".join(lines) + "\n")


class Origin(NamedTuple):
    """What a plan needs of a model: its shape, and its tokenizer if that is available."""

    config: F2LLMConfig
    tokenizer: PreTrainedTokenizerBase | None


def _origin_of(args: StageArguments, earlier: Mapping[str, Origin], sources: Sequence[Source] | None) -> Origin:
    """Return what a stage starts from; ``sources`` can train a tokenizer, None says that no tokenizer is of use."""
    absent = args.model is not None and args.model_family is not None and not Path(args.model).exists()
    made = earlier.get(str(args.tokenizer or args.model))
    tokenizer = None if made is None else made.tokenizer
    if made is None and sources is not None:
        try:
            tokenizer = make_tokenizer(args, list(sources))
        except UserError:
            # The tokenizer of a model that is not here; the family says its shape.
            if not absent or args.tokenizer is not None:
                raise
    if str(args.model) in earlier:
        config = earlier[str(args.model)].config
        check_max_length(args, config, tokenizer)
    elif absent:
        try:
            config = F2LLMConfig.from_pretrained(args.model, local_files_only=True)
        # Not in the Hub's cache. A damaged file can raise any exception.
        except Exception:
            config = F2LLMConfig.from_family(args.model_family)
    else:
        config = make_config(args, tokenizer)
    args.check_family(config)
    return Origin(config, tokenizer)


def _teacher_config(args: StageArguments, earlier: Mapping[str, Origin], inputs: Sequence[Input]) -> F2LLMConfig | None:
    """Return the shape of a stage's teacher; None without one, or for another architecture, which is not counted."""
    if args.teacher is None:
        return None
    if str(args.teacher) in earlier:
        return earlier[str(args.teacher)].config
    maker = next((each.maker for each in inputs if each.key == "teacher"), None)
    try:
        # Another recipe makes it, with the shape that it names.
        if maker is not None and maker.keys.get("model_family") is not None:
            return F2LLMConfig.from_family(maker.keys["model_family"])
        teacher = base_of(args.teacher)
        is_ours = AutoConfig.from_pretrained(teacher, trust_remote_code=False).model_type == "qwen3"
        return F2LLMConfig.from_pretrained(teacher) if is_ours else None
    # `from_pretrained` can raise any exception on a corrupt folder.
    except Exception as error:
        raise UserError(f"key 'teacher': {args.teacher!r} cannot be used: {in_one_line(error)}") from None


@dataclass(frozen=True)
class Data:
    """A stage's data, counted or estimated."""

    description: str  # what it is and where it comes from, for the user
    rows: int  # training rows
    sources: int
    training: Batches
    validation: Batches
    prepared: list[PreparedSource] | None = None  # None if the numbers are estimated


@dataclass(frozen=True)
class Plan:
    """What a training stage would do."""

    stage: Stage
    inputs: Sequence[Input]
    data: Data
    origin: Origin  # what a later stage starts from
    adapter: int  # parameters of the adapter that is trained instead of the model; 0 without one
    steps: int  # these three are upper bounds if the stage may end early
    evaluations: int
    checkpoints: int
    memory: MemoryEstimate  # of a step on one device
    flops: StageFlops  # over all devices
    cache: TeacherPass | None  # pass that fills the teacher's cache; not among the operations
    measured: Measurement | None

    @property
    def seconds(self) -> float | None:
        """Measured time of the whole stage: teacher's pass, steps, evaluations and checkpoints."""
        if self.measured is None:
            return None
        encoded = self.evaluations * self.data.validation.count * self.data.validation.tokens
        encoded += self.cache.student_tokens if self.cache else 0.0
        return (
            self.measured.warm_up
            + encoded * self.measured.seconds_per_token
            + self.steps * self.measured.step_seconds(self.data.training.tokens)
            + (self.checkpoints + 1) * self.measured.checkpoint
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines that the user reads."""
        args, batches, memory, flops = self.stage.arguments, self.data.training, self.memory, self.flops
        about = "about " if self.data.prepared is None else ""
        yield (
            f"stage {self.stage.name}: {about}{self.data.rows:,} rows of {self.data.sources:,} sources, "
            f"{count_parameters(self.origin.config):,} parameters"
            f"{f', frozen; {self.adapter:,} of an adapter' if self.adapter else ''}"
        )
        yield from _io_lines(self.stage, self.inputs, self.data.description)
        ends = "" if args.early_stopping_patience is None else ", fewer if it is stopped early"
        yield f"  steps        {about}{self.steps:,} ({batches.count:,} an epoch){ends}"
        yield (
            f"  tokens       {about}{self.steps * batches.tokens:,.0f}; a step has {batches.tokens:,.0f} in "
            f"{batches.texts:,.0f} distinct texts, {batches.chunks:.1f} chunks on each process"
        )
        sample = args.evaluation_sample
        pairs = f" (up to {sample:,} pairs in each, not counted here)" if sample else ""
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
        if self.measured is not None:
            rate = batches.tokens / self.measured.step_seconds(batches.tokens)
            yield f"  measured     {rate:,.0f} tokens a second, {size(self.measured.peak_bytes)} at most in use"
            yield f"  time         {duration(self.seconds)}"


def _io_lines(stage: Stage, inputs: Sequence[Input], data: str) -> Iterator[str]:
    for key, what in (*((each.key, each.described()) for each in inputs), ("data", data), ("output", made_by(stage))):
        yield f"  {key:<12} {what}"


def make_plan(
    stage: Stage, earlier: Mapping[str, Origin], measure: bool = False, inputs: Sequence[Input] = ()
) -> Plan | PruningStagePlan:
    """Plan a stage: prepare its data, which the run uses again, and count; or estimate if data or tokenizer are remote.

    Nothing remote is listed or fetched. Estimates take the published rows of the manifest, under the caps, and
    ``planned_text_tokens`` for every text. ``earlier`` is what earlier stages of the recipe would make, by folder;
    ``inputs`` is what the stage reads that others may make. ``measure`` runs ten steps, except for pruning.
    """
    args = stage.arguments
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        if args.prunes:
            return _plan_pruning(stage, earlier, inputs)
        away = why_not_local(args)
        all_sources, selected = read_sources(args) if away is None else (None, [])
        check_contrasts(args, selected)
        origin = _origin_of(args, earlier, all_sources)
        teacher = _teacher_config(args, earlier, inputs)
        args.train_dims(origin.config.hidden_size)
        adapter = adapter_config(args)
        if away is None and origin.tokenizer is not None:
            data = _counted(args, prepare_sources(stage, selected, origin.tokenizer))
        else:
            data = _estimated(args, away or f"the tokenizer of {args.model} is not on this machine")
    if measure and data.prepared is None:
        raise UserError(f"stage {stage.name!r} cannot be measured: {data.description}; take --measure out")
    training = data.training
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * training.count)
    evaluations = _occasions(args.eval_strategy, args.eval_steps, steps, training.count)
    memory = estimate_memory(
        origin.config,
        training.most_chunk_tokens,
        training.most_texts,
        args.bf16,
        args.activation_checkpointing,
        # A teacher with a cache is gone before the first step.
        teacher if args.teacher_cache_dir is None else None,
        args.world_size,
        sharded=bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        adapter=adapter,
    )
    return Plan(
        stage,
        inputs,
        data,
        origin,
        adapter=0 if adapter is None else count_adapter(origin.config, adapter),
        steps=steps,
        evaluations=evaluations,
        checkpoints=_occasions(args.save_strategy, args.save_steps, steps, training.count),
        memory=memory,
        flops=stage_flops(args, origin.config, teacher, steps, training, data.validation, evaluations),
        cache=teacher_pass(args, origin.config, teacher, data.prepared),
        measured=measure_stage(stage, origin.config, data.prepared, origin.tokenizer, teacher) if measure else None,
    )


def _counted(args: StageArguments, prepared: list[PreparedSource]) -> Data:
    check_contrasts(args, prepared)
    warn_of_single_rows(args, prepared)
    rows = sum(len(source.rows["train"]) for source in prepared)
    training, validation = (count_batches(args, prepared, split) for split in ("train", "validation"))
    return Data(f"{args.manifest} (local)", rows, len(prepared), training, validation, prepared)


def _estimated(args: StageArguments, why: str) -> Data:
    sizes, share = estimated_sizes(args), args.validation_share
    rows = sum(sum(each.rows) for each in sizes)
    known = "published" if any(each.published for each in sizes) else "counted"
    description = (
        f"{why}: estimated from {rows:,.0f} {known} rows, the caps applied; assumed that every text is distinct and "
        f"has {min(args.planned_text_tokens, args.max_length)} tokens (planned_text_tokens)"
    )
    training, validation = (estimate_batches(args, sizes, each) for each in (1 - share, share))
    return Data(description, round(rows * (1 - share)), sum(len(each.rows) for each in sizes), training, validation)


def _occasions(strategy: str, every: float, steps: int, steps_per_epoch: int) -> int:
    """Return how often something happens that is due every so many steps, or at the end of an epoch."""
    if strategy == "epoch":
        return math.ceil(steps / steps_per_epoch)
    if strategy != "steps":
        return 0
    # A number below one is a share of all steps. The last step always counts.
    return math.ceil(steps / (math.ceil(every * steps) if every < 1 else int(every)))


class PruningStagePlan(NamedTuple):
    """What a pruning stage would do; its time is not measured, because pruning is short beside training."""

    text: list[str]
    flops: StageFlops  # of the calibration
    origin: Origin  # what a later stage starts from
    seconds: None = None

    def lines(self) -> list[str]:
        """Return the lines that the user reads."""
        return self.text


def _plan_pruning(stage: Stage, earlier: Mapping[str, Origin], inputs: Sequence[Input]) -> PruningStagePlan:
    """Plan a pruning stage; no data is prepared."""
    args = stage.arguments
    needs_data = args.trim_vocabulary or args.importance is None
    away = why_not_local(args) if needs_data else None
    all_sources = read_sources(args)[0] if needs_data and away is None else None
    origin = _origin_of(args, earlier, all_sources if needs_data else [])
    target = origin.config
    if args.prune_to is not None:
        target = pruned_config(origin.config, args.mapping("prune_to"), "key 'prune_to'")
    length = min(args.planned_text_tokens, args.max_length)
    tokens = args.calibration_texts * length if args.prune_to is not None and args.importance is None else 0
    data = [away or f"{args.manifest} (local)"] if needs_data else ["none: activations were measured before"]
    if tokens:
        data.append(f"about {args.calibration_texts:,} texts, taken as {length} tokens each (planned_text_tokens)")
    if args.trim_vocabulary:
        data.append("all texts are read for their tokens")
    chunk_tokens = min(tokens, args.max_tokens_per_forward or 8192)
    memory = estimate_pruning_memory(origin.config, target, chunk_tokens, args.bf16)
    flops = StageFlops(evaluations=forward_flops(origin.config, tokens, tokens * length))
    before, after = count_parameters(origin.config), count_parameters(target)
    at_most = " at most: the vocabulary is trimmed" if args.trim_vocabulary else ""
    text = [
        f"stage {stage.name}: cuts {before:,} parameters to {after:,} parameters{at_most}",
        *_io_lines(stage, inputs, "; ".join(data)),
        f"  memory       {size(memory.total)} on one device: {size(memory.state)} weights before and after; "
        f"{size(memory.activations)} activations; {size(memory.program)} the program",
        f"  FLOPs        about {operations(flops.total)}, the calibration",
    ]
    return PruningStagePlan(text, flops, Origin(target, origin.tokenizer))
