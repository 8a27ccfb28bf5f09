"""Build the trainer of a stage: data, tokenizer, model, teacher, evaluation; run every check that needs no step."""

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
from training.common.errors import UserError
from training.common.executor import read_executor
from training.common.outputs import locked, new_folder
from training.common.run_folder import FINAL_MODEL, RECIPE, numbered_checkpoints
from training.config.arguments import StageArguments
from training.config.recipe import Stage
from training.data.builders import build
from training.data.manifest import Source, load_manifest, select_sources
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions, least_negatives
from training.data.prepared import PreparedSource, put_aside, sources_table
from training.distillation.distillation import Distillation, inspect_teacher, make_distillation
from training.evaluation.pairs import Pairs, PairsCallback, load_stage_pairs, sample_pairs
from training.models.adapters import adapter_config, add_adapter, has_adapter
from training.models.loading import load_tokenizer, load_whole_model, source_texts, train_tokenizer
from training.models.model_folder import user_error
from training.models.model_ref import ModelRef, base_of, base_revision, why_not_last_token
from training.models.saved_prompts import choose_prompts, default_prompts
from training.models.static import StaticModel, is_static, load_static
from training.stages.mining import mine_negatives
from training.stages.own_data import add_replay, build_own_data
from training.trainer.batches import batch_sampler, epoch_line
from training.trainer.stopping import EarlyStopping
from training.trainer.trainer import F2LLMTrainer

logger = logging.getLogger("training")

# A tokenizer is trained on every fourth row: enough to learn the pieces of words.
_TOKENIZER_ROWS = 4
# Tokens of a batch of evaluation pairs in training, unless max_tokens_per_forward sets another limit.
_TOKENS_AT_ONCE = 8192


def find_models(args: StageArguments) -> None:
    """Replace the folder of a finished run by that of its model, in the keys that name models."""
    for key in ("model", "teacher", "tokenizer"):
        run = Path(getattr(args, key) or "")
        if run.name and (run / RECIPE).is_file() and (run / FINAL_MODEL).is_dir():
            setattr(args, key, str(run / FINAL_MODEL))


def set_up(stage: Stage) -> F2LLMTrainer:
    """Do all that can fail before the first step, what is cheap first."""
    args = stage.arguments
    set_seed(args.seed)
    find_models(args)
    all_sources, sources = read_sources(args)
    pairs = load_stage_pairs(args)
    tokenizer = make_tokenizer(args, all_sources)
    model = make_model(args, tokenizer)
    _settle_learning_rate(stage, model.num_parameters())
    width = model.config.hidden_size
    # Refuse widths and layers that do not fit.
    args.train_dims(width)
    args.train_exits(model.config.num_hidden_layers)
    teacher = inspect_teacher(args, tokenizer, width) if args.needs_teacher else None
    keep_texts = teacher is not None and teacher.by_text is not None
    prepared = prepare_sources(stage, sources, tokenizer, keep_texts)
    if args.process_index == 0:
        logger.info("%s", sources_table(prepared))
        if (line := epoch_line(batch_sampler(args, prepared), [source.name for source in prepared])) is not None:
            logger.info("%s", line)
    distillation = teacher and make_distillation(teacher, args, prepared, width, model_options(args))
    trainer = make_trainer(stage, model, prepared, tokenizer, distillation)
    if args.lora:
        trainer.base_revision = base_revision(base_of(args.model), "key 'model'")
    _add_evaluation(trainer, pairs)
    return trainer


def _settle_learning_rate(stage: Stage, parameters: int) -> None:
    """Choose the learning rate by the size of the model, if the stage gives none."""
    rates = stage.arguments.mapping("learning_rate_by_size")
    fitting = [each for each in sorted((float(size), rate) for size, rate in rates.items()) if parameters <= each[0]]
    if fitting and "learning_rate" not in stage.keys:
        # Adapters take ten times the rate of whole models.
        stage.arguments.learning_rate = float(fitting[0][1]) * (10 if stage.arguments.lora else 1)
        logger.info("learning rate of a model of %s parameters: %g", f"{parameters:,}", stage.arguments.learning_rate)


def _add_evaluation(trainer: F2LLMTrainer, pairs: Pairs | None) -> None:
    """Add the evaluation of pairs and early stopping; refuse a metric that no evaluation measures."""
    args, config = trainer.args, trainer.model.config
    if pairs is not None and args.evaluation_sample:
        sample = sample_pairs(pairs, args.evaluation_sample, args.evaluation_sample_candidates)
        dims = args.train_dims(config.hidden_size) or [config.hidden_size]
        tokenizer, budget = trainer.processing_class, args.max_tokens_per_forward or _TOKENS_AT_ONCE
        length = min(tokenizer.model_max_length, config.max_position_embeddings)
        watched = PairsCallback(sample, tokenizer, trainer.prompts, dims, trainer.accelerator, length, budget)
        trainer.add_callback(watched)
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    measured = [name.removeprefix("eval_") for name in trainer.metric_names]
    if metric and args.eval_strategy != "no" and metric not in measured:
        # A manifest may have hundreds of sources.
        known = ", ".join(name for name in measured if not name.startswith("source/")) or "nothing"
        raise UserError(
            f"key 'metric_for_best_model': its evaluations measure {known}, not {metric!r}; name one of these, or give "
            "'evaluation_sample' or a larger 'validation_share'"
        )
    if not measured and (args.eval_strategy != "no" or args.eval_on_start):
        raise UserError(
            "keys 'eval_strategy' and 'eval_on_start': no row was kept to be evaluated; raise 'validation_share', or "
            "give 'eval_strategy: no' and 'eval_on_start: false'"
        )


def read_sources(args: StageArguments) -> tuple[list[Source], list[Source]]:
    """Return all sources of the manifest, and those of this stage, which must have something to teach."""
    if args.manifest is None:
        raise UserError("key 'manifest' is missing; give the YAML file that lists the sources, or files as 'data'")
    if args.builder is not None:
        build(args.builder, Path(args.manifest).parent, args.seed, args.mapping("builder_options"))
    manifest, data_dir = build_own_data(args) if args.data else Path(args.manifest), args.data_dir
    if args.mine and not args.prunes:
        found, manifest = manifest, mine_negatives(args, manifest, data_dir)
        data_dir = data_dir if manifest == found else None
    if args.replay:
        manifest = add_replay(args, manifest)
    sources = load_manifest(manifest, data_dir, args.manifest_stage)
    selected = select_sources(sources, args.sources, args.task_types)
    check_contrasts(args, selected)
    caps = [[cap for cap in (source.cap, args.cap_of(source.name)) if cap is not None] for source in selected]
    return sources, [replace(source, cap=min(own, default=None)) for source, own in zip(selected, caps, strict=True)]


def prepare_sources(
    stage: Stage, sources: list[Source], tokenizer: PreTrainedTokenizerBase, keep_texts: bool = False
) -> list[PreparedSource]:
    """Prepare the stage's data, or find it prepared; ``keep_texts`` for a teacher with another tokenizer."""
    args = stage.arguments
    same = ("max_length", "instructions", "document_instruction_share", "validation_share", "seed", "on_bad_row")
    options = PreparationOptions(
        **{name: getattr(args, name) for name in same},
        num_hard_negatives=least_negatives(args.num_hard_negatives, args.min_hard_negatives),
        keep_texts=keep_texts,
        **(default_prompts(args) if any(each.instruction is None for each in sources) else {}),
        text_forms=args.mask_duplicates,
        document_scores=args.learns_scores_of_data,
    )
    try:
        prepared = prepare(sources, tokenizer, args.prepared_folder, options, read_executor(args.executor))
    except OSError as error:
        raise UserError(f"{args.prepared_folder}: cannot be written ({error}); give another prepared_dir") from None
    aside = [line for line in map(put_aside, prepared) if line]
    if not any(len(source.rows["train"]) for source in prepared):
        remedy = "mend these rows" if aside else "lower 'validation_share', or raise 'cap' and 'source_caps'"
        raise UserError("; ".join([f"stage {stage.name!r}: no row is left to train on", *aside, remedy]))
    if args.learns_scores_of_data and not any(source.has_document_scores for source in prepared):
        raise UserError(
            f"stage {stage.name!r}: key 'score_distillation_weight' has no effect: no source has scores of its "
            "documents; give 'teacher: MODEL', add columns 'passage_score', 'negative_1_score', … or take it out"
        )
    for line in aside if args.process_index == 0 else ():
        logger.warning("%s", line)
    warn_of_single_rows(args, prepared)
    return prepared


def check_contrasts(args: StageArguments, sources: Sequence[Source]) -> None:
    """Refuse to draw no hard negatives for clustering and classification, which learn from nothing else but a teacher.

    Preparation refuses files without them.
    """
    for source in sources if not (args.prunes or args.learns_from_teacher) else ():
        kind = source.task_type
        if kind in ("clustering", "classification") and not args.num_hard_negatives[kind]:
            default = type(args).__dataclass_fields__[f"num_hard_negatives_{kind}"].default
            raise UserError(
                f"source {source.name!r}: {kind} learns from hard negatives alone, and none are drawn; write "
                f"'num_hard_negatives_{kind}: {default}', or train on other sources with 'task_types: [retrieval]' or "
                "'sources'"
            )


def warn_of_single_rows(args: StageArguments, sources: Sequence[PreparedSource]) -> None:
    """Warn of retrieval sources some of whose batches have one row and no hard negative."""
    silent = args.prunes or args.learns_from_teacher or args.process_index != 0
    for source in sources if not silent else ():
        rows = len(source.rows["train"])
        batches = -(-rows // args.global_batch_size)
        negatives = min(args.num_hard_negatives["retrieval"], source.num_negatives)
        # Batches differ by one row at most.
        if source.task_type == "retrieval" and not negatives and rows and (single := 2 * batches - rows) > 0:
            logger.warning(
                "source %r: %d of its %d batches have one row and no hard negative, which teach nothing; write "
                "'global_batch_size: 3' or more, or add hard negatives and 'num_hard_negatives_retrieval: 1' or more",
                *(source.name, single, batches),
            )


def model_options(args: StageArguments) -> dict[str, Any]:
    """Return how a model is to run, independent of its weights; other models do not know ``compile``."""
    return {"attn_implementation": args.attn_implementation} | ({"compile": True} if args.compile else {})


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
        with user_error(f"{folder}: cannot be written", "make room or give another output_dir"):
            with new_folder(folder) as partial:
                trained.save_pretrained(partial)
        return load_tokenizer(str(folder))


def make_model(args: StageArguments, tokenizer: PreTrainedTokenizerBase) -> F2LLMModel | StaticModel:
    """Load or make the model, in fp32, with the adapter that is to be trained; read its configurations first."""
    options, start = model_options(args), args.model and ModelRef(args.model, args.model)
    if start and is_static(start):
        return _static_model(args, start, tokenizer)
    if start and start.adapter is not None and not args.lora:
        raise UserError(
            f"key 'model': {args.model} is an adapter of {start.adapter.base}; add 'lora: true' to train it further, "
            f"or merge it first: python training/merge.py {args.model} --output FOLDER"
        )
    adapter, config = adapter_config(args), make_config(args, tokenizer)
    if start and (other := why_not_last_token(start)) is not None:
        raise UserError(
            f"key 'model': {args.model} {other}, but only the embedding at the last token can be trained; start "
            "from a model that is pooled at the last token, or give this one as 'teacher'"
        )
    with user_error(f"model {args.model or 'of model_config'!r} cannot be used"):
        if start:
            model = load_whole_model(args.model, train_adapter=True, **options)
        else:
            model = F2LLMModel._from_config(config, dtype=torch.float32, **options)
    rank = max(model.config.embedding_ranks or [0])
    if args.prunes and rank:
        # What is cut is one matrix.
        model.factorize_embeddings(None)
    elif args.embedding_ranks and max(args.embedding_ranks) != rank and not args.prunes:
        args.check_ranks(config)
        model.factorize_embeddings(args.embedding_ranks)
    if adapter is not None and not has_adapter(model):
        add_adapter(model, adapter)
    return model


def _static_model(args: StageArguments, start: ModelRef, tokenizer: PreTrainedTokenizerBase) -> StaticModel:
    """Load a static model; refuse what it has no layers for."""
    keys = ("lora", "prune_to", "trim_vocabulary", "exit_layers", "embedding_ranks")
    keys += ("compile", "activation_checkpointing", "push_checkpoints", "fsdp", "deepspeed")
    if given := next((key for key in keys if getattr(args, key)), None):
        raise UserError(f"key {given!r} does not go with a static model, which {args.model} is; take it out")
    if any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED")):
        raise UserError(f"key 'model': {args.model} is static and not sharded; launch it with training/launch/ddp.yaml")
    return load_static(start, "key 'model'", tokenizer)


def make_config(args: StageArguments, tokenizer: PreTrainedTokenizerBase | None) -> F2LLMConfig:
    """Return the configuration of the stage's model; a plan may have no tokenizer."""
    if args.model is not None and is_static(args.model):
        raise UserError(f"key 'model': {args.model} is static; its training, of seconds, is not planned, start it")
    ids, token_fields = ("pad_token_id", "bos_token_id", "eos_token_id"), {}
    if tokenizer is not None:
        token_fields = {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in ids}}
    elif args.tokenizer == "train":
        # What the tokenizer that is still to be trained will have; for others the defaults are Qwen3's.
        token_fields = {"vocab_size": args.tokenizer_vocab_size, **dict(zip(ids, (0, 0, 1), strict=True))}
    with user_error(f"model {args.model or 'of model_config'!r} cannot be used"):
        if args.model is not None:
            base = Path(base_of(args.model))
            # transformers takes default values for a folder without it.
            if base.is_dir() and not (base / "config.json").is_file():
                raise ValueError(f"{base} has no config.json")
            config = F2LLMConfig.from_pretrained(base)
        else:
            fields = {**token_fields, **args.mapping("model_config")}
            family = fields.pop("family", None)
            config = F2LLMConfig(**fields) if family is None else F2LLMConfig.from_family(family, **fields)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError("the model cannot be used: num_attention_heads must be a multiple of num_key_value_heads")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        what = f"the tokenizer has {len(tokenizer)} tokens but the model only {config.vocab_size} embeddings"
        raise UserError(f"{what}; leave out 'tokenizer', or give a larger vocab_size in 'model_config'")
    check_max_length(args, config, tokenizer)
    args.check_family(config)
    return config


def check_max_length(args: StageArguments, config: F2LLMConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a ``max_length`` beyond what model and tokenizer read, where the finished model would cut texts."""
    longest, what = config.max_position_embeddings, "positions of the model (max_position_embeddings)"
    if tokenizer is not None and tokenizer.model_max_length < longest:
        longest, what = tokenizer.model_max_length, "tokens of a text that the tokenizer reads (model_max_length)"
    if args.max_length > longest:
        raise UserError(f"key 'max_length': {args.max_length} is more than the {longest} {what}; give at most that")


def make_trainer(
    stage: Stage,
    model: F2LLMModel | StaticModel,
    sources: list[PreparedSource],
    tokenizer: PreTrainedTokenizerBase,
    distillation: Distillation | None = None,
) -> F2LLMTrainer:
    """Make the trainer; a plan measures its steps."""
    args = stage.arguments
    saved = choose_prompts(args, sources, tokenizer)
    if args.process_index == 0:
        level, line = (logging.INFO, saved.line()) if saved.is_trained else (logging.WARNING, saved.warning())
        logger.log(level, "stage %s: %s", stage.name, line)
        if isinstance(model, StaticModel) and saved.prompts["query"]:
            shifts = "it shifts the means of all queries of a static model alike; write 'instructions: false'"
            logger.warning("stage %s: query prompt: %s", stage.name, shifts)
    with user_error(f"stage {stage.name!r}: the training cannot be set up"):
        trainer = F2LLMTrainer(model, args, sources, tokenizer, saved.prompts, distillation)
    if args.lora and trainer.is_deepspeed_enabled:
        raise UserError(f"stage {stage.name!r}: adapters are not trained under DeepSpeed; launch it with DDP or FSDP2")
    if not trainer.is_fsdp_enabled and (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        logger.warning("FSDP is not available on this device: accelerate runs DDP, every process holds the whole model")
    return trainer
