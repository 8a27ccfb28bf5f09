"""What a stage starts from: sources, tokenizer, model, and the trainer over them."""

from __future__ import annotations

import logging
import os
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
from training.data.options import PreparationOptions
from training.data.preparation.pipeline import prepare
from training.data.prepared import PreparedSource, put_aside
from training.distillation.distillation import Distillation, choose_teacher, make_distillation
from training.evaluation.callback import PairsCallback
from training.evaluation.pair_sample import sample_pairs
from training.evaluation.pairs import Pairs
from training.evaluation.stage_pairs import load_stage_pairs
from training.models.adapter import adapter_config, add_adapter, has_adapter
from training.models.adapter_folder import base_of, base_revision, find_adapter
from training.models.loading import load_whole_model
from training.models.saved_prompts import choose_prompts
from training.models.settings import why_not_last_token
from training.models.tokenizer import load_tokenizer, source_texts, train_tokenizer
from training.trainer.contrasts import check_contrasts, warn_of_single_rows
from training.trainer.early_stopping import EarlyStopping
from training.trainer.trainer import F2LLMTrainer

logger = logging.getLogger(__name__)

# Every so many rows are enough to learn the pieces of words from.
_TOKENIZER_ROWS = 4
_MANY_STEPS = 1_000_000
# Of the pairs evaluated in training, where max_tokens_per_forward sets no other limit.
_TOKENS_AT_ONCE = 8192


def set_up(stage: Stage) -> F2LLMTrainer:
    """Everything that can fail before the first step.

    Raises:
        UserError: If something the user gave is faulty.
    """
    args = stage.arguments
    set_seed(args.seed)
    all_sources, sources = read_sources(args)
    check_contrasts(args, sources)
    # A fault in what comes last must not cost the training.
    pairs = load_stage_pairs(args)
    tokenizer = make_tokenizer(args, all_sources)
    model = make_model(args, tokenizer)
    width = model.config.hidden_size
    # Fails on widths that do not fit before the data is prepared.
    args.train_dims(width)
    distillation = None
    if args.teacher is None:
        prepared = prepare_sources(stage, sources, tokenizer)
    else:
        choice = choose_teacher(args, tokenizer, width)
        prepared = prepare_sources(stage, sources, tokenizer, keep_texts=choice.by_text is not None)
        distillation = make_distillation(choice, args, prepared, width, model_options(args))
    check_contrasts(args, prepared)
    if args.process_index == 0:
        warn_of_single_rows(args, prepared)
    trainer = make_trainer(stage, model, prepared, tokenizer, distillation)
    if args.lora:
        trainer.base_revision = base_revision(base_of(args.model), "key 'model'")
    _watch_evaluations(trainer, pairs)
    return trainer


def _watch_evaluations(trainer: F2LLMTrainer, pairs: Pairs | None) -> None:
    """Adds what evaluates pairs in training, and what ends the training by an evaluation.

    Raises:
        UserError: If the best model is to be chosen by something that no evaluation measures.
    """
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


def model_options(args: StageArguments) -> dict[str, Any]:
    """How a model is to run, whatever its weights."""
    # Left out unless asked for: other models that are loaded here do not know it.
    compiled = {"compile": True} if args.compile else {}
    return {"attn_implementation": args.attn_implementation, **compiled}


def read_sources(args: StageArguments) -> tuple[list[Source], list[Source]]:
    """All sources of the manifest, and those of this stage."""
    if args.manifest is None:
        raise UserError("key 'manifest' is missing; give the YAML file that lists the sources")
    if args.builder is not None:
        build(args.builder, Path(args.manifest).parent, args.seed, args.builder_fields())
    sources = load_manifest(args.manifest, args.data_dir, args.manifest_stage)
    selected = select_sources(sources, args.sources, args.task_types)
    return sources, [_capped(source, args.cap_of(source.name)) for source in selected]


def _capped(source: Source, cap: int | None) -> Source:
    caps = [each for each in (source.cap, cap) if each is not None]
    return replace(source, cap=min(caps, default=None))


def make_tokenizer(args: StageArguments, sources: list[Source]) -> PreTrainedTokenizerBase:
    """Loads the stage's tokenizer, or trains it on all sources of the manifest."""
    name = args.tokenizer or args.model
    if name is None:
        raise UserError("key 'tokenizer' is missing: a new model has none; give a name, a folder or 'train'")
    if name != "train":
        return load_tokenizer(name)
    folder = Path(args.output_dir) / "tokenizer"
    # From its first checkpoint on, the recipe of a run is settled, and so is the tokenizer.
    output_dir = Path(args.output_dir)
    started = bool(numbered_checkpoints(output_dir)) or (output_dir / FINAL_MODEL).exists()
    settled = started and (folder / "tokenizer.json").exists()
    if settled or not args.should_save:
        return load_tokenizer(str(folder))
    # All sources of the manifest: later stages use this tokenizer too.
    texts = source_texts(sources, _TOKENIZER_ROWS, skip_bad=args.on_bad_row == "quarantine")
    trained = train_tokenizer(texts, args.tokenizer_vocab_size)
    # A plan of the same stage may write it, too.
    with locked(folder):
        try:
            with new_folder(folder) as partial:
                trained.save_pretrained(partial)
        # A full disk comes out of tokenizers as an error of its own.
        except Exception as error:
            raise UserError(
                f"{folder}: cannot be written ({in_one_line(error)}); make room or give another output_dir"
            ) from None
        return load_tokenizer(str(folder))


def make_model(args: StageArguments, tokenizer: PreTrainedTokenizerBase) -> F2LLMModel:
    """Loads or makes the model, in fp32, with the adapter that is to be trained, if one is.

    Raises:
        UserError: If it cannot be had, or is an adapter and the stage trains whole models.
    """
    started = None if args.model is None else find_adapter(args.model)
    if started is not None and not args.lora:
        raise UserError(
            f"key 'model': {args.model} is an adapter of {started.base}; add 'lora: true' to train it further, or "
            f"merge it first: python training/models/merge_adapter.py {args.model} --output FOLDER"
        )
    # Fails on keys that do not fit before gigabytes are loaded.
    config = adapter_config(args)
    model = _make_model(args, tokenizer)
    if config is not None and not has_adapter(model):
        add_adapter(model, config)
    return model


def _make_model(args: StageArguments, tokenizer: PreTrainedTokenizerBase) -> F2LLMModel:
    try:
        if args.model is None:
            return F2LLMModel._from_config(make_config(args, tokenizer), dtype=torch.float32, **model_options(args))
        # The shape first: a wrong one must not cost the loading of many gigabytes.
        make_config(args, tokenizer)
        _check_reading(args.model)
        model = load_whole_model(args.model, train_adapter=True, **model_options(args))
    except UserError:
        raise
    # Damaged folders and impossible shapes come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"model {args.model or 'of model_config'!r} cannot be used: {in_one_line(error)}") from None
    return model


def _check_reading(name: str) -> None:
    """Refuses a start whose embeddings training would read in another way.

    Raises:
        UserError: If it is not pooled at the last token, or has another module after pooling.
    """
    other = why_not_last_token(name)
    if other is not None:
        raise UserError(
            f"key 'model': {name} {other}, but only the embedding at the last token can be trained; start from a model "
            "that is pooled at the last token, or give this one as 'teacher'"
        )


def make_config(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> F2LLMConfig:
    """The shape of the stage's model.

    Args:
        args: The stage.
        tokenizer: Its tokenizer; None if a plan has none at hand.

    Raises:
        UserError: If there is no such shape, it does not fit the tokenizer or is not that of ``model_family``.
    """
    try:
        config = (
            _new_config(args, tokenizer) if args.model is None else F2LLMConfig.from_pretrained(base_of(args.model))
        )
    except Exception as error:
        raise UserError(f"model {args.model or 'of model_config'!r} cannot be used: {in_one_line(error)}") from None
    _check_config(config, tokenizer)
    check_max_length(args, config, tokenizer)
    args.check_family(config)
    return config


def check_max_length(args: StageArguments, config: F2LLMConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Checks that the finished model reads texts as long as those that it is trained on: it cuts at these limits.

    Raises:
        UserError: If ``max_length`` is more than the model's positions or than what its tokenizer reads.
    """
    limits = {"positions of the model (max_position_embeddings)": config.max_position_embeddings}
    if tokenizer is not None:
        limits["tokens of a text that the tokenizer reads (model_max_length)"] = tokenizer.model_max_length
    what, longest = min(limits.items(), key=lambda limit: limit[1])
    if args.max_length > longest:
        raise UserError(
            f"key 'max_length': {args.max_length} is more than the {longest} {what}, where the finished model would "
            f"cut texts; write 'max_length: {longest}'"
        )


def _new_config(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> F2LLMConfig:
    fields = {**_token_fields(args, tokenizer), **args.model_config_fields()}
    family = fields.pop("family", None)
    return F2LLMConfig(**fields) if family is None else F2LLMConfig.from_family(family, **fields)


def _token_fields(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    if tokenizer is not None:
        ids = ("pad_token_id", "bos_token_id", "eos_token_id")
        return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in ids}}
    # One that is yet to be trained has as many tokens as it is to have; others are taken for Qwen3's.
    if args.tokenizer != "train":
        return {}
    return {"vocab_size": args.tokenizer_vocab_size, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}


def _check_config(config: F2LLMConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError("the model cannot be used: num_attention_heads must be a multiple of num_key_value_heads")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size} embeddings; "
            "use the model's own tokenizer (leave out 'tokenizer') or a larger vocab_size in 'model_config'"
        )


def prepare_sources(
    stage: Stage, sources: list[Source], tokenizer: PreTrainedTokenizerBase, keep_texts: bool = False
) -> list[PreparedSource]:
    """Prepares the stage's data, or finds it prepared.

    Args:
        stage: The stage.
        sources: What to prepare.
        tokenizer: The student's tokenizer.
        keep_texts: Whether texts are kept beside their tokens, for a teacher that reads others.

    Raises:
        UserError: If a source is faulty, the folder cannot be written, or no row is left.
    """
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
        remedy = (
            "mend these rows"
            if aside
            else "lower 'validation_share', as in 'validation_share: 0', or raise 'cap' and 'source_caps'"
        )
        raise UserError("; ".join([f"stage {stage.name!r}: no row is left to train on", *aside, remedy]))
    # The first process speaks for all.
    for line in aside if args.process_index == 0 else ():
        logger.warning("%s", line)
    return prepared


def make_trainer(
    stage: Stage,
    model: F2LLMModel,
    sources: list[PreparedSource],
    tokenizer: PreTrainedTokenizerBase,
    distillation: Distillation | None = None,
) -> F2LLMTrainer:
    """Sets the training up, as far as it can fail before the first step."""
    args = stage.arguments
    saved_prompts = choose_prompts(args, sources, tokenizer)
    try:
        trainer = F2LLMTrainer(model, args, sources, tokenizer, saved_prompts.prompts, distillation)
        # Keys for optimizer and scheduler are looked at only when these are made. Of how many steps, is not known yet.
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
        logger.warning(
            "FSDP was asked for, but accelerate runs DDP on this device: every process holds the whole model"
        )
    return trainer
