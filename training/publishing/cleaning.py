"""What of a run may be told: hyper-parameters and public names, but no places, hosts, users or secrets."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

from huggingface_hub import get_token

from training.errors import UserError
from training.publishing.states import ModelState

__all__ = [
    *("TOLD", "VOCABULARIES", "WITHHELD"),
    *("check_nothing_private", "clean_arguments", "clean_config", "private_texts", "public_name"),
]

# Keys of a stage that change what is learnt, or say when it was looked at.
TOLD = frozenset(
    {
        # Data
        *("manifest_stage", "builder", "builder_options", "sources", "task_types", "cap", "source_caps"),
        *("validation_share", "on_bad_row"),
        # Text
        *("tokenizer_vocab_size", "max_length", "instructions", "document_instruction_share", "query_instruction"),
        # Model
        *("model_config", "model_family", "compile"),
        *("prune_to", "prune_hidden", "prune_layers", "calibration_texts", "trim_vocabulary"),
        *("lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_dora", "lora_rslora"),
        # Batches
        *("global_batch_size", "max_tokens_per_forward", "num_hard_negatives_retrieval"),
        *("num_hard_negatives_clustering", "num_hard_negatives_classification"),
        # Objective
        *("temperature", "matryoshka", "matryoshka_min_dim", "matryoshka_dimensions", "mask_duplicates"),
        *("gather_gradients", "distillation_weight", "teacher_projection"),
        *("teacher_query_template", "teacher_document_template"),
        # Optimizer and schedule
        *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
        *("warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        # Numbers
        *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs"),
        *("use_liger_kernel", "seed", "data_seed", "full_determinism"),
        # Evaluation and the choice of the model
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "logging_steps", "save_strategy", "save_steps"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "evaluation_sample"),
        *("evaluation_sample_candidates", "early_stopping_patience", "early_stopping_threshold"),
    }
)
# Every other key: it names a place, an account, a machine or what a machine was told, or has no effect here.
WITHHELD = frozenset(
    {
        *("output_dir", "manifest", "data_dir", "prepared_dir", "executor", "tokenizer", "model", "teacher"),
        *("teacher_cache_dir", "importance", "evaluation_pairs", "evaluation_candidates", "push_checkpoints"),
        *("resume_from_checkpoint", "attn_implementation"),
        *("run_name", "project", "report_to", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        *("hub_revision", "use_cpu", "planned_text_tokens", "local_rank", "accelerator_config", "parallelism_config"),
        *("fsdp", "fsdp_config", "deepspeed", "debug", "do_train", "do_eval", "do_predict", "disable_tqdm"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode", "liger_kernel_config", "use_cache"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
        *("neftune_noise_alpha", "label_smoothing_factor", "auto_find_batch_size", "torch_empty_cache_steps"),
        *("average_tokens_across_devices", "eval_accumulation_steps", "train_sampling_strategy"),
        *("length_column_name", "label_names", "remove_unused_columns", "skip_memory_metrics"),
        *("logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level"),
        *("log_level_replica", "include_num_input_tokens_seen", "prediction_loss_only", "eval_do_concat_batches"),
        *("eval_use_gather_object", "include_for_metrics", "batch_eval_metrics", "save_only_model"),
        *("save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "dataloader_drop_last", "dataloader_num_workers"),
        *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        *("dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters"),
        *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
    }
)
# Keys that hold a mapping written as JSON.
_MAPPINGS = ("builder_options", "source_caps", "model_config", "prune_to")
# Keys of configurations that tell where a model was loaded from.
_ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "cache_dir", "_commit_hash")
_SECRET = re.compile(r"token|secret|passw|api_?key|access_?key|credential", re.IGNORECASE)
# Shorter ones stand in texts by chance.
_SHORTEST = 8
# Files of a tokenizer that list its tokens.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")


def clean_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a stage that may be told, with mappings as such.

    Args:
        arguments: The stage's keys, as written in a recipe or as ``training_arguments.json`` has them.
    """
    told = {}
    for key, value in arguments.items():
        if key not in TOLD:
            continue
        if key in _MAPPINGS and isinstance(value, str):
            value = json.loads(value)
        if key == "builder_options" and isinstance(value, Mapping):
            # A builder's texts may be folders.
            value = {name: option for name, option in value.items() if isinstance(option, int | float | None)}
        told[key] = value
    return told


def clean_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's or tokenizer's configuration without what tells where it came from."""
    return {key: value for key, value in config.items() if key not in _ORIGINS}


def public_name(place: str) -> str:
    """The last part of a path; nothing if it names this machine or its user.

    Args:
        place: A folder or file.
    """
    name = Path(place).name
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "" if set(words) & {each.lower() for each in _own_names()} else name


def _own_names() -> set[str]:
    host = platform.node()
    names = {host, host.split(".")[0], Path.home().name}
    try:
        names.add(getpass.getuser())
    # A container's user need have no name.
    except (KeyError, OSError):
        pass
    return names - {""}


def private_texts(states: Iterable[ModelState]) -> dict[str, str]:
    """Texts that no packed file may hold, and what each of them is.

    These are the places of the runs, the paths that their recipes name, the home folder, and secrets of the environment
    and of the Hub's client. What they are is told, they themselves are not: a secret belongs into no message.

    Args:
        states: The stages of the lineage.
    """
    texts = _places(Path.home(), "the home folder") | _places(Path.cwd(), "the working folder")
    for state in states:
        for run in (state.run.absolute(), state.run.resolve()):
            texts |= _places(run, f"the place of run {state.name}")
        for key in (WITHHELD | {"builder_options"}) & state.keys.keys():
            for text in _texts(state.keys[key]):
                if "/" in text and not state.is_hub_name(text):
                    texts[text] = f"what key {key!r} of {state.name} says"
    texts |= {value: f"the variable {name}" for name, value in os.environ.items() if _SECRET.search(name)}
    texts |= {token: "the Hub's token" for token in [get_token()] if token}
    return {text: what for text, what in texts.items() if len(text) >= _SHORTEST}


def _places(folder: Path, what: str) -> dict[str, str]:
    """A folder and those that it lies in, but for what is found on any machine: ``/home``, ``/workspace``."""
    return {str(each): what for each in (folder, *folder.parents) if len(each.parts) > 2}


def _texts(value: Any) -> list[str]:
    """All texts in a value of a recipe; a mapping may be written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def check_nothing_private(folder: Path, texts: Mapping[str, str]) -> None:
    """Looks for texts in the files of a folder.

    Args:
        folder: The folder.
        texts: As :func:`private_texts` gives them.

    Raises:
        UserError: If one is found; the message says in which file, and what it is.
    """
    wanted = {written.encode(): what for text, what in texts.items() for written in (text, json.dumps(text)[1:-1])}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        # Numbers under checked names, and a vocabulary that holds `/usr/local` by itself.
        if path.suffix == ".safetensors" or path.name in VOCABULARIES:
            continue
        content = _readable(path)
        for text, what in wanted.items():
            if text in content:
                raise UserError(f"{path.name} would tell {what}; take it out of the run's files and pack again")


def _readable(path: Path) -> bytes:
    """The bytes of a file; of an archive the names and bytes of its members, which may be compressed."""
    if not is_zipfile(path):
        return path.read_bytes()
    with ZipFile(path) as archive:
        return b"\0".join(each for name in archive.namelist() for each in (name.encode(), archive.read(name)))
