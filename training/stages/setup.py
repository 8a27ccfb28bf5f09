"""From a stage to its trainer: data, tokenizer, model, teacher and evaluation; all that can fail before a step."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError, in_one_line
from training.common.executor import read_executor
from training.common.outputs import locked, new_folder
from training.common.run_folder import FINAL_MODEL, numbered_checkpoints
from training.config.arguments import StageArguments
from training.config.recipe import Stage
from training.data.builders import build
from training.data.manifest import Source, load_manifest, select_sources
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.data.prepared import PreparedSource, put_aside
from training.distillation.distillation import Distillation, choose_teacher, make_distillation
from training.evaluation.pairs import Pairs
from training.evaluation.stage_pairs import PairsCallback, load_stage_pairs, sample_pairs
from training.models.adapters import adapter_config, add_adapter, has_adapter
from training.models.loading import load_tokenizer, load_whole_model, source_texts, train_tokenizer
from training.models.model_ref import base_of, base_revision, find_adapter, why_not_last_token
from training.models.saved_prompts import choose_prompts
from training.trainer.console import source_lines
from training.trainer.stopping import EarlyStopping
from training.trainer.trainer import F2LLMTrainer

logger = logging.getLogger("training")

# A tokenizer is trained on every fourth row: enough to learn the pieces of words.
_TOKENIZER_ROWS = 4
_MANY_STEPS = 1_000_000
# Tokens of a batch of evaluation pairs in training, unless max_tokens_per_forward sets another limit.
_TOKENS_AT_ONCE = 8192


def set_up(stage: Stage) -> F2LLMTrainer:
    """Do all that can fail before the first step, what is cheap first."""
    args = stage.arguments
    set_seed(args.seed)
    all_sources, sources = read_sources(args)
    check_contrasts(args, sources)
    pairs = load_stage_pairs(args)
    tokenizer = make_tokenizer(args, all_sources)
    model = make_model(args, tokenizer)
    width = model.config.hidden_size
    # Fails on widths that do not fit.
    args.train_dims(width)
    choice = None if args.teacher is None else choose_teacher(args, tokenizer, width)
    keep_texts = choice is not None and choice.by_text is not None
    prepared = prepare_sources(stage, sources, tokenizer, keep_texts)
    check_contrasts(args, prepared)
    if args.process_index == 0:
        logger.info("%s", source_lines(prepared))
        warn_of_single_rows(args, prepared)
    distillation = None
    if choice is not None:
        distillation = make_distillation(choice, args, prepared, width, model_options(args))
    trainer = make_trainer(stage, model, prepared, tokenizer, distillation)
    if args.lora:
        trainer.base_revision = base_revision(base_of(args.model), "key 'model'")
    _add_evaluation(trainer, pairs)
    return trainer


def _add_evaluation(trainer: F2LLMTrainer, pairs: Pairs | None) -> None:
    """Add the evaluation of pairs and early stopping; refuse a metric that no evaluation measures."""
    args, config = trainer.args, trainer.model.config
    if pairs is not None and args.evaluation_sample:
        sample = sample_pairs(pairs, args.evaluation_sample, args.evaluation_sample_candidates)
        dims = args.train_dims(config.hidden_size) or [config.hidden_size]
        length = min(trainer.processing_class.model_max_length, config.max_position_embeddings)
        budget = args.max_tokens_per_forward or _TOKENS_AT_ONCE
        read = (trainer.processing_class, trainer.prompts)
        trainer.add_callback(PairsCallback(sample, *read, dims, trainer.accelerator, length, budget))
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    measured = [name.removeprefix("eval_") for name in trainer.metric_names]
    if metric and args.eval_strategy != "no" and metric not in measured:
        # A manifest may have hundreds of sources.
        known = ", ".join(name for name in measured if not name.startswith("source/")) or "nothing"
        raise UserError(
            f"key 'metric_for_best_model': its evaluations measure {known}, not {metric!r}; name one of these, "
            "or give 'evaluation_sample' or a larger 'validation_share', as in 'validation_share: 0.05'"
        )
    if not measured and (args.eval_strategy != "no" or args.eval_on_start):
        asked = "eval_on_start: true" if args.eval_strategy == "no" else f"eval_strategy: {args.eval_strategy.value}"
        raise UserError(
            f"key '{asked}': no row was kept to be evaluated; keep more with a larger share, such as "
            "'validation_share: 0.1', or evaluate nothing with 'eval_strategy: no' and 'eval_on_start: false'"
        )


def read_sources(args: StageArguments) -> tuple[list[Source], list[Source]]:
    """Return all sources of the manifest, and those of this stage."""
    if args.manifest is None:
        raise UserError("key 'manifest' is missing; give the YAML file that lists the sources")
    if args.builder is not None:
        build(args.builder, Path(args.manifest).parent, args.seed, args.builder_fields())
    sources = load_manifest(args.manifest, args.data_dir, args.manifest_stage)
    selected = []
    for source in select_sources(sources, args.sources, args.task_types):
        caps = [cap for cap in (source.cap, args.cap_of(source.name)) if cap is not None]
        selected.append(replace(source, cap=min(caps, default=None)))
    return sources, selected


def prepare_sources(
    stage: Stage, sources: list[Source], tokenizer: PreTrainedTokenizerBase, keep_texts: bool = False
) -> list[PreparedSource]:
    """Prepare the stage's data, or find it prepared; ``keep_texts`` for a teacher with another tokenizer."""
    args = stage.arguments
    options = PreparationOptions(
        max_length=args.max_length,
        instructions=args.instructions,
        document_instruction_share=args.document_instruction_share,
        validation_share=args.validation_share,
        num_hard_negatives=tuple(args.num_hard_negatives.items()),
        seed=args.seed,
        on_bad_row=args.on_bad_row,
        keep_texts=keep_texts,
        text_forms=args.mask_duplicates,
    )
    try:
        prepared = prepare(sources, tokenizer, args.prepared_folder, options, read_executor(args.executor))
    except OSError as error:
        raise UserError(f"{args.prepared_folder}: cannot be written ({error}); give another prepared_dir") from None
    aside = [line for line in map(put_aside, prepared) if line]
    if not any(len(source.rows["train"]) for source in prepared):
        lower = "lower 'validation_share', as in 'validation_share: 0', or raise 'cap' and 'source_caps'"
        remedy = "mend these rows" if aside else lower
        raise UserError("; ".join([f"stage {stage.name!r}: no row is left to train on", *aside, remedy]))
    for line in aside if args.process_index == 0 else ():
        logger.warning("%s", line)
    return prepared


def check_contrasts(args: StageArguments, sources: Sequence[Source | PreparedSource]) -> None:
    """Refuse clustering and classification sources without hard negatives, before or after they are prepared.

    They learn from nothing else, unless there is a teacher.
    """
    others = "or train on other sources with 'task_types: [retrieval]' or 'sources'"
    for source in sources:
        kind = source.task_type
        if kind == "retrieval" or _is_taught(args):
            continue
        learns = f"source {source.name!r}: {kind} learns from hard negatives alone, and"
        if not args.num_hard_negatives[kind]:
            default = type(args).__dataclass_fields__[f"num_hard_negatives_{kind}"].default
            raise UserError(f"{learns} none are drawn; write 'num_hard_negatives_{kind}: {default}', {others}")
        if isinstance(source, PreparedSource) and not source.num_negatives:
            raise UserError(f"{learns} its files have no column 'negative_1'; add negatives to them, {others}")


def warn_of_single_rows(args: StageArguments, sources: Sequence[PreparedSource]) -> None:
    """Warn of retrieval sources some of whose batches have one row and no hard negative."""
    for source in sources:
        rows = len(source.rows["train"])
        if source.task_type != "retrieval" or not rows or _is_taught(args):
            continue
        batches = -(-rows // args.global_batch_size)
        # Batches differ by one row at most.
        single = 2 * batches - rows
        if single > 0 and not min(args.num_hard_negatives["retrieval"], source.num_negatives):
            logger.warning(
                "source %r: %d of its %d batches have one row and no hard negative, so that nothing is learnt from "
                "them; %s its rows hard negatives and write 'num_hard_negatives_retrieval: 1' or more",
                *(source.name, single, batches),
                "write 'global_batch_size: 3' or more, or give" if rows > 1 else "add rows, or give",
            )


def _is_taught(args: StageArguments) -> bool:
    return args.teacher is not None and args.distillation_weight > 0


def model_options(args: StageArguments) -> dict[str, Any]:
    """Return how a model is to run, independent of its weights."""
    # `compile` only on demand: other models that are loaded here do not know it.
    return {"attn_implementation": args.attn_implementation, **({"compile": True} if args.compile else {})}


def make_tokenizer(args: StageArguments, sources: list[Source]) -> PreTrainedTokenizerBase:
    """Load the stage's tokenizer, or train it on all sources of the manifest: later stages use it, too."""
    name = args.tokenizer or args.model
    if name is None:
        raise UserError("key 'tokenizer' is missing: a new model has none; give a name, a folder or 'train'")
    if name != "train":
        return load_tokenizer(name)
    output_dir = Path(args.output_dir)
    folder = output_dir / "tokenizer"
    # From its first checkpoint on, the recipe of a run cannot change, nor its tokenizer.
    started = bool(numbered_checkpoints(output_dir)) or (output_dir / FINAL_MODEL).exists()
    if not args.should_save or (started and (folder / "tokenizer.json").exists()):
        return load_tokenizer(str(folder))
    texts = source_texts(sources, _TOKENIZER_ROWS, skip_bad=args.on_bad_row == "quarantine")
    trained = train_tokenizer(texts, args.tokenizer_vocab_size)
    # A plan of the same stage may write it, too.
    with locked(folder):
        try:
            with new_folder(folder) as partial:
                trained.save_pretrained(partial)
        # tokenizers raises another error than OSError for a full disk.
        except Exception as error:
            what = f"{folder}: cannot be written ({in_one_line(error)})"
            raise UserError(f"{what}; make room or give another output_dir") from None
        return load_tokenizer(str(folder))


def make_model(args: StageArguments, tokenizer: PreTrainedTokenizerBase) -> F2LLMModel:
    """Load or make the model, in fp32, with the adapter that is to be trained, if one is.

    All faults that the configurations show are found before gigabytes are loaded.
    """
    started = None if args.model is None else find_adapter(args.model)
    if started is not None and not args.lora:
        raise UserError(
            f"key 'model': {args.model} is an adapter of {started.base}; add 'lora: true' to train it further, or "
            f"merge it first: python training/merge.py {args.model} --output FOLDER"
        )
    adapter = adapter_config(args)
    config = make_config(args, tokenizer)
    try:
        if args.model is None:
            model = F2LLMModel._from_config(config, dtype=torch.float32, **model_options(args))
        elif (other := why_not_last_token(args.model)) is None:
            model = load_whole_model(args.model, train_adapter=True, **model_options(args))
        else:
            raise UserError(
                f"key 'model': {args.model} {other}, but only the embedding at the last token can be trained; start "
                "from a model that is pooled at the last token, or give this one as 'teacher'"
            )
    except UserError:
        raise
    # The libraries can raise any exception on damaged folders and impossible shapes.
    except Exception as error:
        raise _unusable(args, error) from None
    if adapter is not None and not has_adapter(model):
        add_adapter(model, adapter)
    return model


def _unusable(args: StageArguments, error: Exception) -> UserError:
    return UserError(f"model {args.model or 'of model_config'!r} cannot be used: {in_one_line(error)}")


def make_config(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> F2LLMConfig:
    """Return the configuration of the stage's model; a plan may have no tokenizer."""
    try:
        if args.model is not None:
            config = F2LLMConfig.from_pretrained(base_of(args.model))
        else:
            fields = {**_token_fields(args, tokenizer), **args.model_config_fields()}
            family = fields.pop("family", None)
            config = F2LLMConfig(**fields) if family is None else F2LLMConfig.from_family(family, **fields)
    except Exception as error:
        raise _unusable(args, error) from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError("the model cannot be used: num_attention_heads must be a multiple of num_key_value_heads")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size} embeddings; "
            "use the model's own tokenizer (leave out 'tokenizer') or a larger vocab_size in 'model_config'"
        )
    check_max_length(args, config, tokenizer)
    args.check_family(config)
    return config


def _token_fields(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    if tokenizer is not None:
        ids = ("pad_token_id", "bos_token_id", "eos_token_id")
        return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in ids}}
    # A tokenizer that is still to be trained gets this size; for others the defaults are Qwen3's.
    if args.tokenizer != "train":
        return {}
    return {"vocab_size": args.tokenizer_vocab_size, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}


def check_max_length(args: StageArguments, config: F2LLMConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a ``max_length`` beyond the positions of the model or the limit of its tokenizer, which would cut."""
    limits = {"positions of the model (max_position_embeddings)": config.max_position_embeddings}
    if tokenizer is not None:
        limits["tokens of a text that the tokenizer reads (model_max_length)"] = tokenizer.model_max_length
    what, longest = min(limits.items(), key=lambda limit: limit[1])
    if args.max_length > longest:
        raise UserError(
            f"key 'max_length': {args.max_length} is more than the {longest} {what}, where the finished model would "
            f"cut texts; write 'max_length: {longest}'"
        )


def make_trainer(
    stage: Stage,
    model: F2LLMModel,
    sources: list[PreparedSource],
    tokenizer: PreTrainedTokenizerBase,
    distillation: Distillation | None = None,
) -> F2LLMTrainer:
    """Make the trainer, and refuse keys with which it could not train."""
    args = stage.arguments
    saved_prompts = choose_prompts(args, sources, tokenizer)
    try:
        trainer = F2LLMTrainer(model, args, sources, tokenizer, saved_prompts.prompts, distillation)
        # Trainer reads the keys of optimizer and schedule only when it makes them: when it knows how many steps there
        # are, and where FSDP has wrapped the model. These are a trial.
        trainer.create_optimizer_and_scheduler(num_training_steps=_MANY_STEPS)
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"stage {stage.name!r}: the training cannot be set up: {in_one_line(error)}") from None
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.saved_prompts = saved_prompts
    if args.lora and trainer.is_deepspeed_enabled:
        raise UserError(f"stage {stage.name!r}: adapters are not trained under DeepSpeed; launch it with DDP or FSDP2")
    if not trainer.is_fsdp_enabled and (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        logger.warning("FSDP is not available on this device: accelerate runs DDP, every process holds the whole model")
    return trainer
