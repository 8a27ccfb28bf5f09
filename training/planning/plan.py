"""What the stages of a recipe would do: data, steps, tokens, memory, operations and time, before any of them runs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.command import duration, operations, size
from training.common.errors import UserError
from training.config.arguments import StageArguments
from training.config.recipe import Input, Recipe, Stage, find_inputs, made_by, missing_error
from training.data.manifest import Source
from training.data.prepared import PreparedSource
from training.distillation.distillation import is_given_texts
from training.evaluation.pairs import load_stage_pairs
from training.models.adapters import adapter_config
from training.models.model_folder import count_parameters, forward_flops, user_error
from training.models.model_ref import ModelRef, base_of
from training.planning import costs
from training.planning.batches import Batches, count_batches, estimate_batches, estimated_sizes, why_not_local
from training.planning.devices import Fleet
from training.planning.table import Row, table
from training.pruning.plan import pruned_config
from training.pruning.search import Budget, possible_shapes, shapes_line
from training.stages.setup import (
    check_max_length,
    find_models,
    make_config,
    make_tokenizer,
    prepare_sources,
    read_sources,
)


def device_overrides() -> dict[str, bool]:
    """Return keys with which a recipe for GPUs is planned without one, where transformers refuses bf16."""
    return {} if torch.accelerator.is_available() else {"use_cpu": True}


def show_plans(recipe: Recipe, chosen: Sequence[Stage], measure: bool, fleet: Fleet | None = None) -> None:
    """Write the plans of stages to the standard output, each as soon as it is made; last, what they take on a fleet."""
    rows: list[Row] = []
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
        plan = make_plan(stage, origins, measure, inputs, fleet and fleet.count)
        # After the builder, which may make the pairs; a pruning stage may have built nothing.
        if not args.prunes:
            load_stage_pairs(args)
        origins[made_by(stage)] = plan.origin
        seconds += plan.seconds
        flops += plan.flops
        rows.append(Row(stage.name, args, plan.steps, plan.memory, plan.estimate, plan.seconds_on))
        if args.process_index == 0:
            sys.stdout.write("\n".join(plan.lines) + "\n")
    if len(chosen) > 1 and chosen[0].arguments.process_index == 0:
        without = "; data preparation, pruning and evaluation of the result left out"
        time = f", {duration(seconds)}{without}" if measure else ""
        sys.stdout.write(f"all stages: about {operations(flops)}{time}\n")
    if fleet is not None and chosen[0].arguments.process_index == 0:
        sys.stdout.write("\n".join(table(fleet, rows)) + "\n")


class Origin(NamedTuple):
    """What a plan needs of a model: its shape, and its tokenizer if that is available."""

    config: F2LLMConfig
    tokenizer: PreTrainedTokenizerBase | None


def _origin_of(args: StageArguments, earlier: Mapping[str, Origin], sources: Sequence[Source] | None) -> Origin:
    """Return what a stage starts from; ``sources`` can train a tokenizer, None says that no tokenizer is of use."""
    absent = args.model is not None and args.model_family is not None and not Path(args.model).exists()
    made, tokenizer = earlier.get(str(args.tokenizer or args.model)), None
    if made is not None:
        tokenizer = made.tokenizer
    elif sources is not None:
        # The tokenizer of a model may not be here; the family says its shape.
        with suppress(UserError) if absent and args.tokenizer is None else nullcontext():
            tokenizer = make_tokenizer(args, list(sources))
    if str(args.model) in earlier:
        config = earlier[str(args.model)].config
        check_max_length(args, config, tokenizer)
    elif absent:
        config = F2LLMConfig.from_family(args.model_family)
        # Unless it is in the Hub's cache. A damaged file can raise any exception.
        with suppress(Exception):
            config = F2LLMConfig.from_pretrained(args.model, local_files_only=True)
    else:
        config = make_config(args, tokenizer)
    args.check_family(config)
    if args.embedding_ranks or args.prunes:
        args.check_ranks(config)
        config = deepcopy(config)
        # What is cut has one matrix of token embeddings.
        config.embedding_ranks = None if args.prunes else sorted({*args.embedding_ranks})
    return Origin(config, tokenizer)


def _teacher_config(args: StageArguments, earlier: Mapping[str, Origin], inputs: Sequence[Input]) -> F2LLMConfig | None:
    """Return the shape of a stage's teacher; None without one, or for another architecture, which is not counted."""
    if not args.needs_teacher:
        return None
    if str(args.teacher) in earlier:
        return earlier[str(args.teacher)].config
    maker = next((each.maker for each in inputs if each.key == "teacher"), None)
    with user_error(f"key 'teacher': {args.teacher!r} cannot be used"):
        # Another recipe makes it, with the shape that it names.
        if maker is not None and maker.keys.get("model_family") is not None:
            return F2LLMConfig.from_family(maker.keys["model_family"])
        teacher = base_of(args.teacher)
        is_ours = AutoConfig.from_pretrained(teacher, trust_remote_code=False).model_type == "qwen3"
        return F2LLMConfig.from_pretrained(teacher) if is_ours else None


class Data(NamedTuple):
    """A stage's data, counted or estimated."""

    description: str  # for the user
    rows: int  # training rows
    sources: int
    training: Batches
    validation: Batches
    prepared: list[PreparedSource] | None = None  # None if the numbers are estimated


class Plan(NamedTuple):
    """What a stage would do. Steps, evaluations and checkpoints are upper bounds if it may end early."""

    lines: list[str]  # for the user
    origin: Origin  # what a later stage starts from
    memory: costs.MemoryEstimate  # on one device
    flops: float  # over all devices; without the pass that fills a teacher's cache
    steps: int = 0
    evaluations: int = 0
    checkpoints: int = 0
    training: Batches = Batches()
    seconds: float = 0.0  # 0 if nothing was measured
    estimate: partial[costs.MemoryEstimate] | None = None  # memory with other keys
    seconds_on: Callable[[Fleet], float] = lambda fleet: 0.0  # of the whole stage and a teacher's cache, predicted


def _lines(stage: Stage, summary: str, inputs: Sequence[Input], facts: Mapping[str, str]) -> list[str]:
    facts = {**{each.key: each.described() for each in inputs}, "output": made_by(stage), **facts}
    return [f"stage {stage.name}: {summary}", *(f"  {name:<12} {fact}" for name, fact in facts.items())]


def _cost_facts(memory: costs.MemoryEstimate, flops: float, state: str) -> dict[str, str]:
    names = (state, "activations", "loss", "teacher", "gathered")
    parts = [f"{size(value)} {name}" for name, value in zip(names, memory, strict=True) if value]
    return {
        "memory": f"about {size(memory.total)} on each device: {', '.join(parts)}",
        "FLOPs": f"about {operations(flops)}",
    }


def make_plan(
    stage: Stage,
    earlier: Mapping[str, Origin],
    measure: bool = False,
    inputs: Sequence[Input] = (),
    processes: int | None = None,  # if not those of this launch
) -> Plan:
    """Plan a stage: prepare its data, which the run uses again, and count; or estimate if data or tokenizer are remote.

    Nothing remote is listed or fetched. Estimates take the published rows of the manifest, under the caps, and
    ``planned_text_tokens`` for every text. ``earlier`` is what earlier stages of the recipe would make, by folder;
    ``inputs`` is what the stage reads that others may make. ``measure`` runs ten steps, except for pruning.
    """
    args = stage.arguments
    processes = processes or args.world_size
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        find_models(args)
        if args.prunes:
            return _plan_pruning(stage, earlier, inputs)
        away = why_not_local(args)
        all_sources, selected = read_sources(args) if away is None else (None, [])
        origin = _origin_of(args, earlier, all_sources)
        teacher = _teacher_config(args, earlier, inputs)
        args.train_dims(origin.config.hidden_size)
        args.train_exits(origin.config.num_hidden_layers)
        adapter = adapter_config(args)
        if away is None and origin.tokenizer is not None:
            there = any(each.key == "teacher" and not each.missing for each in inputs)
            ref = ModelRef(args.teacher, args.teacher) if there else None
            keep_texts = args.needs_teacher and is_given_texts(args, ref, origin.tokenizer)
            data = _counted(args, prepare_sources(stage, selected, origin.tokenizer, keep_texts), processes)
        else:
            data = _estimated(args, away or f"the tokenizer of {args.model} is not on this machine", processes)
    if measure and data.prepared is None:
        raise UserError(f"stage {stage.name!r} cannot be measured: {data.description}; take --measure out")
    config, training, validation = origin.config, data.training, data.validation
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * training.count)
    evaluations = _occasions(args.eval_strategy, args.eval_steps, steps, training.count)
    checkpoints = _occasions(args.save_strategy, args.save_steps, steps, training.count)
    # A teacher with a cache embeds all texts once, and is gone before the first step.
    cached, online = (teacher, None) if args.teacher_cache_dir else (None, teacher)
    sums = (steps, training, validation, evaluations)
    flops = costs.stage_flops(args, config, online, *sums)
    half = args.bf16 or args.fp16
    kept, of_teacher = costs.kept_bytes(config, half, adapter), 0.0
    parameters, sharded = count_parameters(config), is_sharded(args)
    widths = teacher.hidden_size if teacher else 0
    loss = costs.loss_bytes(args, config, min(args.global_batch_size, data.rows), training.most_texts, widths)
    known = {"config": config, "chunk_tokens": training.most_chunk_tokens, "loss": loss, "bf16": half}
    known |= {"gradient_checkpointing": args.activation_checkpointing, "processes": processes, "sharded": sharded}
    known |= {"adapter": adapter, "kept": kept, "parameters": parameters}
    if online is not None:
        known["teacher"], of_teacher = count_parameters(online), costs.kept_bytes(online, half).of(online)
    estimate = partial(costs.estimate_memory, **known)
    memory = estimate()
    traffic = costs.stage_traffic(args, kept.of(config), of_teacher, *sums)
    optimized = parameters if adapter is None else costs.count_adapter(config, adapter)
    optimized /= processes if sharded else 1
    about = "about " if data.prepared is None else ""
    ends = "" if args.early_stopping_patience is None else ", fewer if it is stopped early"
    pairs = f" (up to {args.evaluation_sample:,} pairs in each, not counted here)" if args.evaluation_sample else ""
    trained = "" if adapter is None else f", frozen; {costs.count_adapter(config, adapter):,} of an adapter"
    facts = {
        "data": data.description,
        "steps": f"{about}{steps:,} ({training.count:,} an epoch){ends}",
        "tokens": f"{about}{steps * training.tokens:,.0f}; a step has {training.tokens:,.0f} in {training.texts:,.0f} "
        f"distinct texts, {training.chunks:.1f} chunks on each process",
        "evaluations": f"{evaluations:,}{pairs}, checkpoints {checkpoints:,}",
        **_cost_facts(memory, flops, "weights, gradients, optimizer"),
    }
    if args.needs_teacher and teacher is None:
        facts["not counted"] = "the teacher, which is no Qwen3: its memory, operations and time"
    seconds = fill = filled = 0.0
    encoded = evaluations * validation.count * validation.tokens
    if cached is not None:
        texts, tokens = (training.count * each for each in (training.texts, training.tokens))
        if data.prepared is not None:
            texts, tokens = (sum(source.description[what] for source in data.prepared) for what in ("texts", "tokens"))
        # As if all texts had the same length: attention is a small part of the cost.
        own, fill = (forward_flops(each, texts, tokens, tokens**2 / max(texts, 1)) for each in (config, cached))
        encoded += tokens * fill / own
        filled = tokens * costs.kept_bytes(cached, half).of(cached)
        facts["cache"] = (
            f"the teacher embeds {texts:,.0f} texts of {tokens:,.0f} tokens once for all students, less what is there "
            f"already: {operations(fill)}, {size(2 * texts * cached.hidden_size)} on disk"
        )
    if measure:
        each, peak = costs.measure_stage(stage, config, data.prepared, origin.tokenizer, online)
        # A step takes three times the operations of a forward pass.
        seconds = (steps * training.tokens + encoded / 3) * each
        facts["time"] = f"{duration(seconds)}; measured {1 / each:,.0f} tokens a second, {size(peak)} at most in use"

    def seconds_on(fleet: Fleet) -> float:
        return fleet.seconds(args, flops + fill, traffic + filled, steps, loss, optimized)

    summary = f"{about}{data.rows:,} rows of {data.sources:,} sources, {parameters:,} parameters{trained}"
    lines = _lines(stage, summary, inputs, facts)
    return Plan(lines, origin, memory, flops, steps, evaluations, checkpoints, training, seconds, estimate, seconds_on)


def is_sharded(args: StageArguments) -> bool:
    """Return whether processes would share weights, gradients and optimizer."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _counted(args: StageArguments, prepared: list[PreparedSource], processes: int) -> Data:
    rows = sum(len(source.rows["train"]) for source in prepared)
    training, validation = (count_batches(args, prepared, split, processes) for split in ("train", "validation"))
    return Data(f"{args.manifest} (local)", rows, len(prepared), training, validation, prepared)


def _estimated(args: StageArguments, why: str, processes: int) -> Data:
    sizes, share = estimated_sizes(args), args.validation_share
    rows = sum(sum(each.rows) for each in sizes)
    description = (
        f"{why}: estimated from {rows:,.0f} rows, the caps applied; assumed that every text is distinct and has "
        f"{min(args.planned_text_tokens, args.max_length)} tokens (planned_text_tokens)"
    )
    training, validation = (estimate_batches(args, sizes, split, processes) for split in ("train", "validation"))
    return Data(description, round(rows * (1 - share)), sum(len(each.rows) for each in sizes), training, validation)


def _occasions(strategy: str, every: float, steps: int, steps_per_epoch: int) -> int:
    """Return how often something happens that is due every so many steps, or at the end of an epoch."""
    if strategy == "epoch":
        return math.ceil(steps / steps_per_epoch)
    if strategy != "steps":
        return 0
    # A number below one is a share of all steps. The last step always counts.
    return math.ceil(steps / (math.ceil(every * steps) if every < 1 else int(every)))


def _plan_pruning(stage: Stage, earlier: Mapping[str, Origin], inputs: Sequence[Input]) -> Plan:
    """Plan a pruning stage; no data is prepared, and nothing is measured, because pruning is short beside training."""
    args = stage.arguments
    given, where = args.mapping("prune_to"), "key 'prune_to'"
    budget = Budget.read(given, where)
    needs_data = args.trim_vocabulary or args.importance is None or budget is not None
    away = why_not_local(args) if needs_data else None
    all_sources = read_sources(args)[0] if needs_data and away is None else None
    origin = _origin_of(args, earlier, all_sources if needs_data else [])
    target, shapes, calibrates = origin.config, [], args.prune_to is not None and args.importance is None
    if budget is not None:
        whole = origin.config.vocab_size
        # How many the sources use is not known yet.
        sizes = [whole >> halved for halved in range(whole.bit_length() - 8)] if args.trim_vocabulary else [whole]
        shapes = possible_shapes(origin.config, budget, sizes)
        taken = shapes[len(shapes) // 2]
        target = taken.cut(origin.config)
        target.vocab_size = taken.vocab_size
    elif args.prune_to is not None:
        target = pruned_config(origin.config, given, where)
    length, data, tokens = min(args.planned_text_tokens, args.max_length), "none: activations were measured before", 0
    if needs_data:
        data = (away or f"{args.manifest} (local)") + "; all texts are read for their tokens" * args.trim_vocabulary
    if calibrates or shapes:
        tokens = args.calibration_texts * length
        data += f"; about {args.calibration_texts:,} texts, taken as {length} tokens each (planned_text_tokens)"
    before, after = count_parameters(origin.config), count_parameters(target)
    at_most = " at most: the vocabulary is trimmed" if args.trim_vocabulary else ""
    chunk_tokens = min(tokens, args.max_tokens_per_forward or 8192)
    memory = costs.estimate_pruning_memory(origin.config, target, chunk_tokens, args.bf16)
    passes = (tokens / length, tokens, tokens * length)
    flops = forward_flops(origin.config, *passes) * (calibrates + bool(shapes))
    flops += len(shapes) * forward_flops(target, *passes)
    tried = {"budget": f"{budget}; taken here: {taken}", "shapes": shapes_line(shapes)} if budget is not None else {}
    summary = f"cuts {before:,} parameters to {after:,} parameters{at_most}"
    facts = {"data": data, **tried, **_cost_facts(memory, flops, "weights before and after")}
    return Plan(
        **{"lines": _lines(stage, summary, inputs, facts), "memory": memory, "flops": flops},
        origin=Origin(target, origin.tokenizer),
        # A single process prunes.
        seconds_on=lambda fleet: fleet._replace(count=1).seconds(args, flops),
    )
