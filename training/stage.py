"""Running one stage: data, tokenizer, model, training, saving."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase, set_seed

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from modeling_f2llm.modeling_f2llm import F2LLMModel
from modeling_f2llm.prompts import DEFAULT_INSTRUCTION, instruct
from training.arguments import StageArguments
from training.checkpoints import last_checkpoint, numbered_checkpoints, publish, write_whole
from training.data.builders import build
from training.data.manifest import Source, load_manifest, select_sources
from training.data.prepare import PreparationOptions, prepare
from training.data.prepared import PreparedSource
from training.data.tokenizer import load_tokenizer, source_texts, train_tokenizer
from training.errors import InterruptedTrainingError, StoppedError, UserError
from training.evaluation.pairs import load_pairs
from training.recipe import FINAL_MODEL, Stage
from training.teacher import load_teacher
from training.trainer import F2LLMTrainer

__all__ = ["run_stage"]

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
# Every so many rows are enough to learn the pieces of words from.
_TOKENIZER_ROWS = 4
DATA = "data.json"
# What a run makes before it starts to train: made anew, or checked by fingerprint, when it is started again.
_PREPARATIONS = {"prepared", "tokenizer", f".{RECIPE}.partial"}
# Keys that may differ between a run and its continuation: none of them changes what is learnt.
_FREE_KEYS = {
    *("output_dir", "logging_steps", "logging_first_step", "report_to", "disable_tqdm", "save_total_limit"),
    *("max_tokens_per_forward", "compile", "attn_implementation", "gradient_checkpointing", "use_cpu"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("ddp_timeout", "ddp_backend", "ddp_bucket_cap_mb", "save_on_each_node"),
}


def run_stage(stage: Stage, resume: bool = False, accept_changes: bool = False) -> Path:
    """Runs a stage to its end and returns the folder of the finished model.

    On several processes, every one of them calls this.

    Args:
        stage: The stage.
        resume: Go on from the last checkpoint, or return at once if the stage is finished.
        accept_changes: Go on although recipe or data changed since the run was started.

    Raises:
        UserError: If something the user gave is faulty, or the output folder holds another run.
        StoppedError: If the training had to stop; its last checkpoint is whole.
    """
    args = stage.arguments
    if args.n_gpu > 1:
        raise UserError(
            f"stage {stage.name!r}: one process drives one device; start one for each of the {args.n_gpu} with "
            "'accelerate launch', or set CUDA_VISIBLE_DEVICES to one of them"
        )
    output_dir = Path(args.output_dir)
    final = output_dir / FINAL_MODEL
    # The first process makes what the others then find.
    with args.main_process_first(local=args.save_on_each_node):
        _check_output(output_dir, stage, resume, accept_changes)
        if (final / "config.json").exists():
            logger.info("stage %s is finished: %s", stage.name, final)
            return final
        trainer = _set_up(stage)
        checkpoint = last_checkpoint(output_dir) if resume else None
        _record(output_dir, stage, trainer.sources, checkpoint, accept_changes)
    _train(trainer, checkpoint)
    _save(trainer, final)
    return final


def _set_up(stage: Stage) -> F2LLMTrainer:
    """Everything that can fail before the first step."""
    args = stage.arguments
    set_seed(args.seed)
    all_sources, sources = _sources(args)
    if args.evaluation_pairs:
        # A fault in what comes last must not cost the training.
        load_pairs(args.evaluation_pairs, args.evaluation_candidates)
    tokenizer = _tokenizer(args, all_sources)
    model = _model(args, tokenizer)
    # Fails on widths that do not fit before the data is prepared.
    args.train_dims(model.config.hidden_size)
    return _trainer(stage, model, sources, tokenizer)


def _train(trainer: F2LLMTrainer, checkpoint: Path | None) -> None:
    """Trains to the end.

    Raises:
        StoppedError: If that is not to be; the message says how to go on.
    """
    go_on = "run the same command with --resume"
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except StoppedError:
        raise
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) or "DataLoader worker" in str(error):
            saved = last_checkpoint(Path(trainer.args.output_dir)) or "none yet"
            what = _in_one_line(error)
            raise StoppedError(f"{what}; last good checkpoint: {saved}. Mend that and {go_on}") from error
        if not _lost_contact(error):
            raise
        raise StoppedError(
            f"process {trainer.args.process_index} lost contact with another one: look above for what ended that one, "
            f"then {go_on} ({_in_one_line(error)})"
        ) from error
    number = trainer.interruption.signal
    if number and trainer.state.global_step < trainer.state.max_steps:
        raise InterruptedTrainingError(
            f"{signal.Signals(number).name} at step {trainer.state.global_step} of {trainer.state.max_steps}; saved "
            f"{last_checkpoint(Path(trainer.args.output_dir))}. To go on, {go_on}",
            number,
        )


def _lost_contact(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _save(trainer: F2LLMTrainer, final: Path) -> None:
    partial = final.with_name(f".{FINAL_MODEL}.partial")
    try:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            # Fails if the run's folder has vanished.
            partial.mkdir()
        trainer.save_model(str(partial))
        if trainer.args.should_save:
            publish(partial, final)
    except StoppedError:
        raise
    # A full disk comes out of safetensors as an error of its own.
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StoppedError(
            f"{final}: the finished model could not be written ({_in_one_line(error)}); last good checkpoint: "
            f"{last_checkpoint(final.parent) or 'none yet'}. Mend that and run the same command with --resume"
        ) from error
    trainer.accelerator.wait_for_everyone()


def _check_output(output_dir: Path, stage: Stage, resume: bool, accept_changes: bool) -> None:
    """Makes sure that the output folder can be written and holds nothing that this run would overwrite."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        held = {path.name for path in output_dir.iterdir()} - _PREPARATIONS
        if not os.access(output_dir, os.W_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        raise UserError(f"{output_dir}: cannot be written ({error}); give another output_dir") from None
    if held and RECIPE not in held:
        raise UserError(f"{output_dir}: the folder holds something else; give another output_dir")
    numbered = numbered_checkpoints(output_dir)
    if numbered and FINAL_MODEL not in held and last_checkpoint(output_dir) is None:
        raise UserError(
            f"{output_dir}: none of the checkpoints can be resumed from, {numbered[-1].name} and others lack the state "
            f"of optimizer and scheduler (save_only_model?); start anew from 'model: {numbered[-1]}' with another "
            "output_dir"
        )
    started = FINAL_MODEL in held or bool(numbered)
    if started and not resume:
        raise UserError(
            f"{output_dir}: the folder holds another run; add --resume to go on, or give another output_dir"
        )
    # A run that ended before its first checkpoint has nothing to lose: its recipe may be corrected.
    if started:
        _check_same_recipe(output_dir / RECIPE, stage.keys, accept_changes)


def _trainer(
    stage: Stage, model: F2LLMModel, sources: list[Source], tokenizer: PreTrainedTokenizerBase
) -> F2LLMTrainer:
    """Prepares the data and sets the training up, as far as it can fail before the first step."""
    args = stage.arguments
    try:
        prepared = prepare(sources, tokenizer, args.prepared_folder, _options(args))
        width = model.config.hidden_size
        teacher = load_teacher(args.teacher, tokenizer, width, args.attn_implementation) if args.teacher else None
    except OSError as error:
        raise UserError(f"{args.prepared_folder}: cannot be written ({error}); give another prepared_dir") from None
    if not any(len(source.rows["train"]) for source in prepared):
        raise UserError(f"stage {stage.name!r}: no row is left to train on; lower 'validation_share' or raise the caps")
    try:
        trainer = F2LLMTrainer(model, args, prepared, tokenizer, _prompts(args), teacher)
        # Keys for optimizer and scheduler are looked at only when these are made.
        trainer.create_optimizer_and_scheduler(num_training_steps=2)
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"stage {stage.name!r}: the training cannot be set up: {_in_one_line(error)}") from None
    trainer.optimizer = trainer.lr_scheduler = None
    return trainer


def _record(
    output_dir: Path, stage: Stage, sources: list[PreparedSource], checkpoint: Path | None, accept_changes: bool
) -> None:
    """Notes what the run is made of, or checks that a continued run is made of the same."""
    data = {source.name: source.description["fingerprint"] for source in sources}
    noted = output_dir / DATA
    if checkpoint is not None and noted.exists():
        before = json.loads(noted.read_text())
        changed = sorted(name for name in {*before, *data} if before.get(name) != data.get(name))
        if changed:
            _changed(f"{noted}: the data changed since the run started ({', '.join(changed)})", accept_changes)
    if stage.arguments.should_save:
        # First what tells the folder from a foreign one.
        write_whole(output_dir / RECIPE, yaml.safe_dump(stage.keys, sort_keys=False))
        write_whole(noted, json.dumps(data, indent=2))


def _changed(what: str, accepted: bool) -> None:
    """Warns of a change since the run was started, or refuses it."""
    if not accepted:
        raise UserError(f"{what}; undo it, give another output_dir, or add --accept-changes to go on regardless")
    logger.warning("%s; going on regardless", what)


def _in_one_line(error: Exception) -> str:
    text = str(error).strip()
    # A loader worker hands its traceback on: what happened is in the last line.
    if "in DataLoader worker" in text:
        text = text.splitlines()[-1]
    return " ".join(text.split())[:300]


def _check_same_recipe(written: Path, keys: dict[str, Any], accept_changes: bool) -> None:
    before = yaml.safe_load(written.read_text())
    changed = sorted(key for key in {*before, *keys} - _FREE_KEYS if _plain(before.get(key)) != _plain(keys.get(key)))
    if changed:
        differences = ", ".join(f"{key}: {before.get(key)!r} → {keys.get(key)!r}" for key in changed)
        _changed(f"{written}: the run was started with other keys ({differences})", accept_changes)


def _plain(value: Any) -> Any:
    """A value as the command line would give it."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return value if value is None or isinstance(value, dict) else str(value).lower()


def _sources(args: StageArguments) -> tuple[list[Source], list[Source]]:
    """All sources of the manifest, and those of this stage."""
    if args.manifest is None:
        raise UserError("key 'manifest' is missing; give the YAML file that lists the sources")
    if args.builder is not None:
        build(args.builder, Path(args.manifest).parent, args.seed)
    sources = load_manifest(args.manifest)
    selected = select_sources(sources, args.sources, args.task_types)
    return sources, [_capped(source, args.cap_of(source.name)) for source in selected]


def _capped(source: Source, cap: int | None) -> Source:
    caps = [each for each in (source.cap, cap) if each is not None]
    return replace(source, cap=min(caps, default=None))


def _tokenizer(args: StageArguments, sources: list[Source]) -> PreTrainedTokenizerBase:
    name = args.tokenizer or args.model
    if name is None:
        raise UserError("key 'tokenizer' is missing: a new model has none; give a name, a folder or 'train'")
    if name != "train":
        return load_tokenizer(name)
    folder = Path(args.output_dir) / "tokenizer"
    # Once the training has started, the recipe is settled, and so is the tokenizer.
    settled = (Path(args.output_dir) / RECIPE).exists() and (folder / "tokenizer.json").exists()
    if args.should_save and not settled:
        # All sources of the manifest: later stages use this tokenizer too.
        trained = train_tokenizer(source_texts(sources, _TOKENIZER_ROWS), args.tokenizer_vocab_size)
        try:
            trained.save_pretrained(folder)
        # A full disk comes out of tokenizers as an error of its own.
        except Exception as error:
            raise UserError(
                f"{folder}: cannot be written ({_in_one_line(error)}); make room or give another output_dir"
            ) from None
    return load_tokenizer(str(folder))


def _model(args: StageArguments, tokenizer: PreTrainedTokenizerBase) -> F2LLMModel:
    """Loads or makes the model, in fp32: AdamW at these learning rates is lost on bf16 weights."""
    try:
        if args.model is not None:
            model, loaded = F2LLMModel.from_pretrained(
                args.model,
                dtype=torch.float32,
                attn_implementation=args.attn_implementation,
                output_loading_info=True,
            )
            if loaded["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(loaded['missing_keys'])[0]} and others")
        else:
            model = F2LLMModel._from_config(
                _new_config(args, tokenizer), dtype=torch.float32, attn_implementation=args.attn_implementation
            )
        if model.config.num_attention_heads % model.config.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
    # Damaged folders and impossible shapes come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"model {args.model or 'of model_config'!r} cannot be used: {_in_one_line(error)}") from None
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {model.config.vocab_size} embeddings; "
            "use the model's own tokenizer (leave out 'tokenizer') or a larger vocab_size in 'model_config'"
        )
    return model


def _new_config(args: StageArguments, tokenizer: PreTrainedTokenizerBase) -> F2LLMConfig:
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **args.model_config_fields(),
    }
    family = fields.pop("family", None)
    return F2LLMConfig(**fields) if family is None else F2LLMConfig.from_family(family, **fields)


def _options(args: StageArguments) -> PreparationOptions:
    return PreparationOptions(
        max_length=args.max_length,
        instructions=args.instructions,
        document_instruction_share=args.document_instruction_share,
        validation_share=args.validation_share,
        num_hard_negatives=tuple(args.num_hard_negatives.items()),
        seed=args.seed,
    )


def _prompts(args: StageArguments) -> dict[str, str]:
    """A model trained on raw text is used on raw text."""
    query = instruct(args.query_instruction or DEFAULT_INSTRUCTION) if args.instructions else ""
    return {"query": query, "document": ""}
