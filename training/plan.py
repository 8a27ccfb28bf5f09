"""What a stage would do, before it does it: inputs, steps, tokens, memory, operations, and time if it is measured.

Where a stage's data is on this machine it is prepared, and batches are counted. Where it is not, nothing is fetched:
the plan is estimated from the sizes that the manifest gives, and says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.arguments import StageArguments
from training.counting import Batches, count_batches, estimate_batches
from training.data.prepared import PreparedSource
from training.data_sizes import estimated_sizes, why_not_at_hand
from training.errors import UserError, in_one_line
from training.flops import StageFlops, forward_flops, stage_flops
from training.inputs import Input
from training.measure import Measurement, measure_stage
from training.memory import MemoryEstimate, count_parameters, estimate_memory
from training.pruning import pruned_config
from training.recipe import FINAL_MODEL, Stage
from training.setup import make_config, make_tokenizer, prepare_sources, read_sources

__all__ = ["Origin", "Plan", "PruningForecast", "duration", "made_by", "make_plan", "plan_pruning"]


class Origin(NamedTuple):
    """What a stage's model will be like: all that a plan needs of it. The tokenizer is None where none is at hand."""

    config: F2LLMConfig
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True)
class Plan:
    """What a stage of training would do.

    Attributes:
        name: The stage's name.
        inputs: What it starts from.
        output: Folder of the model that it makes.
        rows: Training rows of the stage's sources.
        sources: Number of sources.
        parameters: Parameters of the model.
        steps: Optimizer steps of the whole stage.
        training: The batches of an epoch.
        validation: Those of an evaluation.
        evaluations: Evaluations of the whole stage.
        checkpoints: Checkpoints of the whole stage.
        memory: What a step needs of one device.
        flops: Floating-point operations of the whole stage.
        origin: What a later stage starts from.
        estimated: Why rows and tokens are estimates, if they are.
        cache: The teacher's pass over all texts, if its embeddings are to be kept.
        measured: Ten steps, if they were run.
    """

    name: str
    inputs: Sequence[Input]
    output: str
    rows: int
    sources: int
    parameters: int
    steps: int
    training: Batches
    validation: Batches
    evaluations: int
    checkpoints: int
    memory: MemoryEstimate
    flops: StageFlops
    origin: Origin
    estimated: str | None = None
    cache: TeacherPass | None = None
    measured: Measurement | None = None

    @property
    def seconds(self) -> float | None:
        """Time of the whole stage, once it is measured: teacher's pass, steps, evaluations and checkpoints."""
        if self.measured is None:
            return None
        return (
            self.measured.warm_up
            + (self.cache.forward_tokens * self.measured.seconds_per_token if self.cache else 0.0)
            + self.steps * self.measured.step_seconds(self.training.tokens)
            + self.evaluations * self.validation.count * self.validation.tokens * self.measured.seconds_per_token
            + (self.checkpoints + 1) * self.measured.checkpoint
        )

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        batches, memory, about = self.training, self.memory, "about " if self.estimated else ""
        yield f"stage {self.name}: {about}{self.rows:,} rows of {self.sources} sources, {self.parameters:,} parameters"
        yield from _in_and_out(self.inputs, self.output)
        if self.estimated:
            yield f"  estimated    {self.estimated}"
        yield f"  steps        {about}{self.steps:,} ({batches.count:,} an epoch)"
        yield (
            f"  tokens       {about}{self.steps * batches.tokens:,.0f}; a step has {batches.tokens:,.0f} in "
            f"{batches.texts:,.0f} distinct texts, {batches.chunks:.1f} chunks on each process"
        )
        yield f"  evaluations  {self.evaluations:,}, checkpoints {self.checkpoints:,}"
        yield (
            f"  memory       {_size(memory.total)} on each device: {_size(memory.state)} weights, gradients, "
            f"optimizer; {_size(memory.activations)} activations of {batches.most_chunk_tokens:,} tokens; "
            f"{_size(memory.loss)} embeddings; {_size(memory.program)} the program"
            + (f"; {_size(memory.teacher)} teacher" if memory.teacher else "")
        )
        yield f"  operations   {about}{self.flops.total:.2e} FLOPs"
        if self.cache is not None:
            yield (
                f"  teacher      embeds {self.cache.texts:,} texts of {self.cache.tokens:,} tokens once, "
                f"{_size(self.cache.bytes)} on disk, {self.cache.flops:.2e} FLOPs, less what is there already"
            )
        if self.measured is not None and self.seconds is not None:
            rate = batches.tokens / self.measured.step_seconds(batches.tokens)
            yield f"  measured     {rate:,.0f} tokens a second, {_size(self.measured.peak_bytes)} at most in use"
            yield f"  time         {duration(self.seconds)}"


class TeacherPass(NamedTuple):
    """The pass in which a teacher embeds every text of the prepared sources, for its cache.

    Attributes:
        texts: Texts of all sources.
        tokens: Their tokens.
        bytes: Of the embeddings on disk.
        flops: Floating-point operations.
        forward_tokens: Tokens that the student encodes in the same number of operations.
    """

    texts: int
    tokens: int
    bytes: int
    flops: float
    forward_tokens: float


@dataclass(frozen=True)
class PruningForecast:
    """What a stage of pruning would do.

    Attributes:
        name: The stage's name.
        inputs: What it starts from.
        output: Folder of the model that it makes.
        parameters: Parameters of the model that is cut, and of what is left.
        memory: Bytes of both models in fp32.
        origin: What a later stage starts from.
    """

    name: str
    inputs: Sequence[Input]
    output: str
    parameters: tuple[int, int]
    memory: int
    origin: Origin
    flops: StageFlops = field(default_factory=StageFlops)
    seconds: float | None = None

    def lines(self) -> Iterator[str]:
        """The forecast in words."""
        before, after = self.parameters
        yield f"stage {self.name}: cut from {before:,} to {after:,} parameters"
        yield from _in_and_out(self.inputs, self.output)
        yield f"  memory       {_size(self.memory)} weights of both models"


def _in_and_out(inputs: Sequence[Input], output: str) -> Iterator[str]:
    for each in inputs:
        yield f"  {each.key:<12} {each.name} ({each.state})"
    yield f"  output       {output}"


def make_plan(stage: Stage, earlier: Mapping[str, Origin], measure: bool = False, inputs: Sequence[Input] = ()) -> Plan:
    """Plans a stage of training.

    Where its data is on this machine, it is prepared, and the run will use it again.

    Args:
        stage: The stage.
        earlier: What earlier stages of the recipe would make, by folder.
        measure: Whether to run ten steps for their time and memory.
        inputs: What the stage starts from, to be shown.

    Raises:
        UserError: If something the user gave is faulty, or a stage is to be measured whose data or tokenizer is not at
            hand.
    """
    args = stage.arguments
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        origin = earlier.get(str(args.model))
        why = why_not_at_hand(args)
        if why is None and origin is not None and origin.tokenizer is None:
            why = "the tokenizer is not at hand"
        if why is not None and measure:
            raise UserError(f"stage {stage.name!r}: nothing can be measured: {why}; leave out --measure")
        if why is None:
            all_sources, selected = read_sources(args)
            tokenizer = origin.tokenizer if origin else make_tokenizer(args, all_sources)
        else:
            tokenizer = None
        config = origin.config if origin else _stage_config(args, tokenizer)
        teacher = _teacher_config(args, earlier)
        args.train_dims(config.hidden_size)
        sources = prepare_sources(stage, selected, tokenizer) if why is None else []
    if why is None:
        training, validation = (count_batches(args, sources, split) for split in ("train", "validation"))
        rows, count = sum(len(source.rows["train"]) for source in sources), len(sources)
    else:
        sizes = estimated_sizes(args)
        shares = 1 - args.validation_share, args.validation_share
        training, validation = (estimate_batches(args, sizes, share) for share in shares)
        rows = round(sum(sum(each.rows) for each in sizes) * shares[0])
        count = sum(len(each.rows) for each in sizes)
        why = f"{why}: rows as published, texts of {min(args.planned_text_tokens, args.max_length)} tokens"
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * training.count)
    evaluations = _occasions(args.eval_strategy, args.eval_steps, steps, training.count)
    return Plan(
        name=stage.name,
        inputs=inputs,
        output=made_by(stage),
        rows=rows,
        sources=count,
        parameters=count_parameters(config),
        steps=steps,
        training=training,
        validation=validation,
        evaluations=evaluations,
        checkpoints=_occasions(args.save_strategy, args.save_steps, steps, training.count),
        memory=estimate_memory(
            config,
            training.most_chunk_tokens,
            training.most_texts,
            args.bf16,
            args.gradient_checkpointing,
            None if args.teacher_cache_dir else teacher,
            args.world_size,
            sharded=bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        ),
        flops=stage_flops(args, config, teacher, steps, training, validation, evaluations),
        origin=Origin(config, tokenizer),
        estimated=why,
        cache=_teacher_pass(args, config, teacher, sources),
        measured=measure_stage(stage, config, sources, tokenizer, teacher) if measure else None,
    )


def plan_pruning(stage: Stage, earlier: Mapping[str, Origin], inputs: Sequence[Input] = ()) -> PruningForecast:
    """Plans a stage of pruning; the size of a trimmed vocabulary is known only when it has run.

    Args:
        stage: The stage.
        earlier: What earlier stages of the recipe would make, by folder.
        inputs: What the stage starts from, to be shown.

    Raises:
        UserError: If the model cannot be cut to that shape.
    """
    args = stage.arguments
    origin = earlier.get(str(args.model)) or Origin(_stage_config(args, None), None)
    tokenizer = origin.tokenizer
    if tokenizer is None and Path(args.model).is_dir():
        tokenizer = make_tokenizer(args, [])
    shape = origin.config if args.prune_to is None else pruned_config(origin.config, args.prune_to_fields())
    before, after = count_parameters(origin.config), count_parameters(shape)
    return PruningForecast(
        stage.name, inputs, made_by(stage), (before, after), 4 * (before + after), Origin(shape, tokenizer)
    )


def _stage_config(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> F2LLMConfig:
    """The shape of the stage's model: its own, or the published one that stands for a model on the Hub."""
    if args.model is not None and args.model_family is not None and not Path(args.model).is_dir():
        return F2LLMConfig.from_family(args.model_family)
    return make_config(args, tokenizer)


def _teacher_config(args: StageArguments, earlier: Mapping[str, Origin]) -> F2LLMConfig | None:
    """The teacher's shape; None without a teacher, or for one of another architecture, which is not counted."""
    if args.teacher is None or str(args.teacher) in earlier:
        return None if args.teacher is None else earlier[args.teacher].config
    try:
        config = F2LLMConfig.from_pretrained(args.teacher)
    # Damaged folders come out of the library as anything.
    except Exception as error:
        if Path(args.teacher, "modules.json").exists():
            return None
        raise UserError(f"key 'teacher': {args.teacher!r} cannot be used: {in_one_line(error)}") from None
    return config


def _teacher_pass(
    args: StageArguments, config: F2LLMConfig, teacher: F2LLMConfig | None, sources: Sequence[PreparedSource]
) -> TeacherPass | None:
    if args.teacher_cache_dir is None or teacher is None or not sources:
        return None
    texts, tokens = (sum(source.description[what] for source in sources) for what in ("texts", "tokens"))
    # Texts of one length stand for all: attention is a small part of it.
    squared = tokens**2 / max(texts, 1)
    flops, own = forward_flops(teacher, tokens, squared), forward_flops(config, tokens, squared)
    return TeacherPass(texts, tokens, 2 * texts * teacher.hidden_size, flops, tokens * flops / own)


def made_by(stage: Stage) -> str:
    """The folder of the model that a stage makes, as later stages name it."""
    return str(Path(stage.arguments.output_dir) / FINAL_MODEL)


def _occasions(strategy: str, every: float, steps: int, steps_per_epoch: int) -> int:
    """How often something happens that is due every so many steps, or at the end of an epoch."""
    if strategy == "epoch":
        return math.ceil(steps / steps_per_epoch)
    if strategy != "steps":
        return 0
    # A number below one is a share of all steps; what is due at intervals is done at the last step too.
    return math.ceil(steps / (math.ceil(every * steps) if every < 1 else int(every)))


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 / 10 else f"{number / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """A time span in words."""
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
