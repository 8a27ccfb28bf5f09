"""Roles of a stage's keys, the keys of transformers that are refused, and secrets that no recipe may hold.

A role decides whether a model card lists the key and whether it may change in a resumed run:

========  ==============  ===================================================================
role      on model cards  in a resumed run
========  ==============  ===================================================================
learnt    yes             must stay: it changes what is learnt, or how that is judged
running   yes             may change: how the same is computed, watched or ended
path      no              must stay: a path, or how many machines share the work
machine   no              may change: an account, a machine or a log
========  ==============  ===================================================================
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any

from training.common.errors import UserError
from training.config.arguments import StageArguments

logger = logging.getLogger(__name__)

# Keys that only transformers declares; the others have their role in the metadata of their field.
_OF_TRANSFORMERS = {
    "learnt": "num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim "
    "optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm bf16 fp16 tf32 use_liger_kernel seed "
    "full_determinism eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps "
    "load_best_model_at_end metric_for_best_model greater_is_better",
    "running": "gradient_checkpointing gradient_checkpointing_kwargs",
    "path": "fsdp fsdp_config deepspeed",
    "machine": "output_dir use_cpu save_total_limit save_on_each_node debug skip_memory_metrics run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id disable_tqdm logging_strategy log_on_each_node "
    "log_level log_level_replica dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers "
    "dataloader_pin_memory ddp_timeout ddp_backend ddp_bucket_cap_mb ddp_static_graph",
}
# Checkpoints hold the state of these: an optimizer of a kind, the scale of gradients.
_NEVER = ("optim", "optim_args", "fp16")


def _keys_by(rule: str, value: str) -> frozenset[str]:
    return frozenset(each.name for each in fields(StageArguments) if each.metadata.get("rules", {}).get(rule) == value)


LEARNT, RUNNING, PLACES, MACHINE = (
    _keys_by("role", role) | {*names.split()} for role, names in _OF_TRANSFORMERS.items()
)
# Keys that cannot change in a resumed run, because its checkpoints hold what follows from them.
NEVER = _keys_by("resume", "never") | {*_NEVER}
# Keys that may change unless evaluation pairs choose the best model: scores before and after would not compare.
SAMPLE = _keys_by("resume", "sample")
# Keys that may change unless dropout is drawn: it depends on how the texts are divided.
CHUNKS = _keys_by("resume", "chunks")
# Keys of the finished model's evaluation, which may change afterwards.
EVALUATION = _keys_by("resume", "evaluation")

# Keys of transformers that this trainer does not read, or that would do harm, with what to do instead.
_REFUSED = {
    "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size": "a batch is that of all processes: "
    "give 'global_batch_size' for its rows and 'max_tokens_per_forward' for what is encoded at once",
    "bf16_full_eval fp16_full_eval": "validation is computed in the precision of the training, which 'bf16' sets; take "
    "it out",
    "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision": "give 'push_checkpoints: "
    "ORG/NAME' to publish checkpoints, and publish the finished model by training/publish.py",
    "hub_token": "a token in a recipe would be copied to the run's folder; set the variable HF_TOKEN or run 'hf auth "
    "login'",
    "torch_compile torch_compile_backend torch_compile_mode": "it compiles what packed batches never run; give "
    "'compile: true'",
    "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint": "add --resume to the command to "
    "go on from the last checkpoint of 'output_dir', or give 'model: FOLDER' to start from the weights of another",
    "data_seed dataloader_drop_last train_sampling_strategy length_column_name dataloader_in_order": "the order of the "
    "batches follows 'seed' on any number of processes and workers; give that",
    "parallelism_config": "give 'fsdp' or 'deepspeed', or start with 'accelerate launch --config_file'",
    "torch_empty_cache_steps": "give 'max_tokens_per_forward' to bound memory",
    "save_only_model": "it leaves checkpoints that cannot be resumed from; give 'save_strategy: no' to save the "
    "finished model alone",
    "enable_jit_checkpoint": "SIGTERM and SIGINT write a checkpoint already; take it out",
    "per_device_eval_batch_size eval_accumulation_steps prediction_loss_only eval_do_concat_batches local_rank "
    "eval_use_gather_object batch_eval_metrics include_for_metrics label_names do_train do_eval do_predict "
    "remove_unused_columns dataloader_multiprocessing_context accelerator_config average_tokens_across_devices "
    "label_smoothing_factor neftune_noise_alpha logging_nan_inf_filter use_cache": "this trainer, which packs texts "
    "and divides batches itself, does not read it; take it out",
}
REFUSED: Mapping[str, str] = {name: reason for names, reason in _REFUSED.items() for name in names.split()}

_SECRET_NAME = re.compile(
    r"(^|_)(api|access|auth|hub|hf|bearer|secret)_?(token|key)$|(^|_)(token|password|passwd|secret|credentials?)$",
    re.IGNORECASE,
)
# A token of the Hub, or a user and password in an address.
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@")


def check_given(keys: Mapping[str, Any]) -> None:
    """Refuse keys given to a stage that would have no effect with any value, and values that hold a secret."""
    for key, value in keys.items():
        if key in REFUSED:
            raise UserError(f"key {key!r} has no effect: {REFUSED[key]}")
        if key not in LEARNT | RUNNING | PLACES | MACHINE:
            logger.warning("key %r is new in this version of transformers: it may have no effect here", key)
        if _holds_secret(value):
            what = f"key {key!r} holds a secret, which would be copied to the run's folder"
            raise UserError(f"{what}; take it out and set it as a variable of the environment, such as HF_TOKEN")


def _holds_secret(value: Any) -> bool:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        # A mapping as the command line gives it; invalid JSON is refused where it is read.
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        named = any(isinstance(each, str) and each and _SECRET_NAME.search(str(name)) for name, each in value.items())
        return named or any(map(_holds_secret, value.values()))
    if isinstance(value, list):
        return any(map(_holds_secret, value))
    return isinstance(value, str) and bool(_SECRET_VALUE.search(value))
