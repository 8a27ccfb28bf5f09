"""What a stage would do, before it does it: steps, tokens, memory, and time from a short measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.arguments import StageArguments
from training.collator import PackedCollator, PreparedRows
from training.data.prepared import PreparedSource
from training.errors import UserError, in_one_line
from training.layout import lay_out
from training.measure import Measurement, measure_stage
from training.memory import MemoryEstimate, count_parameters, estimate_memory
from training.recipe import FINAL_MODEL, Stage
from training.sampler import GlobalBatchSampler
from training.setup import make_config, make_tokenizer, prepare_sources, read_sources

__all__ = ["Batches", "Origin", "Plan", "count_batches", "duration", "made_by", "make_plan"]

# Batches whose texts are counted; an epoch's tokens are estimated from them.
_SAMPLE = 256


class Origin(NamedTuple):
    """What a stage's model will be like: all that a plan needs of it."""

    config: F2LLMConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch.

    Attributes:
        count: Number of batches.
        tokens: Tokens of a batch on average, each distinct text once.
        texts: Distinct texts of a batch on average.
        chunks: Forward passes of a batch on each process on average.
        most_texts: Distinct texts of the largest batch seen.
        most_chunk_tokens: Tokens of the largest chunk seen.
    """

    count: int = 0
    tokens: float = 0.0
    texts: float = 0.0
    chunks: float = 0.0
    most_texts: int = 0
    most_chunk_tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """What a stage would do.

    Attributes:
        name: The stage's name.
        rows: Training rows of the stage's sources.
        sources: Number of sources.
        parameters: Parameters of the model.
        steps: Optimizer steps of the whole stage.
        training: The batches of an epoch.
        validation: Those of an evaluation.
        evaluations: Evaluations of the whole stage.
        checkpoints: Checkpoints of the whole stage.
        memory: What a step needs of one device.
        measured: Ten steps, if they were run.
        origin: What a later stage starts from.
    """

    name: str
    rows: int
    sources: int
    parameters: int
    steps: int
    training: Batches
    validation: Batches
    evaluations: int
    checkpoints: int
    memory: MemoryEstimate
    measured: Measurement | None
    origin: Origin

    @property
    def seconds(self) -> float | None:
        """Time of the whole stage, once it is measured: steps, evaluations and checkpoints."""
        if self.measured is None:
            return None
        return (
            self.measured.warm_up
            + self.steps * self.measured.step_seconds(self.training.tokens)
            + self.evaluations * self.validation.count * self.validation.tokens * self.measured.seconds_per_token
            + (self.checkpoints + 1) * self.measured.checkpoint
        )

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        batches, memory = self.training, self.memory
        yield f"stage {self.name}: {self.rows:,} rows of {self.sources} sources, {self.parameters:,} parameters"
        yield f"  steps        {self.steps:,} ({batches.count:,} an epoch)"
        yield (
            f"  tokens       {self.steps * batches.tokens:,.0f}; a step has {batches.tokens:,.0f} in "
            f"{batches.texts:,.0f} distinct texts, {batches.chunks:.1f} chunks on each process"
        )
        yield f"  evaluations  {self.evaluations:,}, checkpoints {self.checkpoints:,}"
        yield (
            f"  memory       {_size(memory.total)} on each device: {_size(memory.state)} weights, gradients, "
            f"optimizer; {_size(memory.activations)} activations of {batches.most_chunk_tokens:,} tokens; "
            f"{_size(memory.loss)} embeddings; {_size(memory.program)} the program"
            + (f"; {_size(memory.teacher)} teacher" if memory.teacher else "")
        )
        if self.measured is not None and self.seconds is not None:
            rate = batches.tokens / self.measured.step_seconds(batches.tokens)
            yield f"  measured     {rate:,.0f} tokens a second, {_size(self.measured.peak_bytes)} at most in use"
            yield f"  time         {duration(self.seconds)}"


def make_plan(stage: Stage, earlier: Mapping[str, Origin], measure: bool = False) -> Plan:
    """Plans a stage: prepares its data, which the run will use again, and counts.

    Args:
        stage: The stage.
        earlier: What earlier stages of the recipe would make, by folder.
        measure: Whether to run ten steps for their time and memory.

    Raises:
        UserError: If something the user gave is faulty.
    """
    args = stage.arguments
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        all_sources, selected = read_sources(args)
        origin = earlier.get(str(args.model))
        tokenizer = origin.tokenizer if origin else make_tokenizer(args, all_sources)
        config = origin.config if origin else make_config(args, tokenizer)
        teacher = _teacher_config(args, earlier)
        args.train_dims(config.hidden_size)
        sources = prepare_sources(stage, selected, tokenizer)
    training = count_batches(args, sources, "train")
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * training.count)
    return Plan(
        name=stage.name,
        rows=sum(len(source.rows["train"]) for source in sources),
        sources=len(sources),
        parameters=count_parameters(config),
        steps=steps,
        training=training,
        validation=count_batches(args, sources, "validation"),
        evaluations=_occasions(args.eval_strategy, args.eval_steps, steps, training.count),
        checkpoints=_occasions(args.save_strategy, args.save_steps, steps, training.count),
        memory=estimate_memory(
            config,
            training.most_chunk_tokens,
            training.most_texts,
            args.bf16,
            args.gradient_checkpointing,
            teacher,
            args.world_size,
            sharded=bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        ),
        measured=measure_stage(stage, config, sources, tokenizer, teacher) if measure else None,
        origin=Origin(config, tokenizer),
    )


def _teacher_config(args: StageArguments, earlier: Mapping[str, Origin]) -> F2LLMConfig | None:
    if args.teacher is None or str(args.teacher) in earlier:
        return None if args.teacher is None else earlier[args.teacher].config
    try:
        return F2LLMConfig.from_pretrained(args.teacher)
    # Damaged folders come out of the library as anything.
    except Exception as error:
        raise UserError(f"key 'teacher': {args.teacher!r} cannot be used: {in_one_line(error)}") from None


def made_by(stage: Stage) -> str:
    """The folder of the model that a stage makes, as later stages name it."""
    return str(Path(stage.arguments.output_dir) / FINAL_MODEL)


def count_batches(args: StageArguments, sources: list[PreparedSource], split: str) -> Batches:
    """Counts the texts and tokens of an epoch's batches, from a sample of them spread over the epoch."""
    rows = [len(source.rows[split]) for source in sources]
    if not sum(rows):
        return Batches()
    sampler = GlobalBatchSampler(rows, args.global_batch_size, args.seed)
    collator = PackedCollator(sources, args.num_hard_negatives, args.seed)
    dataset = PreparedRows(sources, split)
    every = max(len(sampler) // _SAMPLE, 1)
    lengths = [
        collator.text_lengths([dataset[key] for key in keys]) for i, keys in enumerate(sampler) if i % every == 0
    ]
    layouts = [lay_out(each, 0, args.world_size, args.max_tokens_per_forward) for each in lengths]
    return Batches(
        count=len(sampler),
        tokens=float(np.mean([each.sum() for each in lengths])),
        texts=float(np.mean([len(each) for each in lengths])),
        chunks=float(np.mean([len(layout.chunks) for layout in layouts])),
        most_texts=max(len(each) for each in lengths),
        most_chunk_tokens=max(
            int(each[chunk].sum()) for each, layout in zip(lengths, layouts, strict=True) for chunk in layout.chunks
        ),
    )


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
