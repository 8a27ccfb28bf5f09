"""What each key of a stage does: one table for recipes, for continued runs and for what is published."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from training.common.errors import UserError

logger = logging.getLogger(__name__)

# Keys that change what is learnt, or how it is judged. A model card lists them; a continued run must have the same.
LEARNT = frozenset(
    {
        # Data
        *("manifest_stage", "builder", "builder_options", "sources", "task_types", "cap", "source_caps"),
        *("validation_share", "on_bad_row"),
        # Text
        *("tokenizer_vocab_size", "max_length", "instructions", "document_instruction_share", "query_instruction"),
        # Model
        *("model_config", "prune_to", "prune_hidden", "prune_layers", "calibration_texts", "trim_vocabulary"),
        *("lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_dora", "lora_rslora"),
        # Batches
        *("global_batch_size", "num_hard_negatives_retrieval"),
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
        *("bf16", "fp16", "tf32", "use_liger_kernel", "liger_kernel_config", "seed", "full_determinism"),
        # Evaluation and the choice of the model
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    }
)
# Keys of how the same is computed, watched or ended. A model card lists them; they may change in a continued run.
RUNNING = frozenset(
    {
        *("model_family", "compile", "max_tokens_per_forward", "logging_steps"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        # These two decide what is learnt where the best model is chosen by pairs: see training/stages/continuation.py.
        *("evaluation_sample", "evaluation_sample_candidates"),
        *("early_stopping_patience", "early_stopping_threshold"),
    }
)
# Keys that name a place, or how many machines share the work. No card lists them; a continued run must have the same.
PLACES = frozenset(
    {
        *("manifest", "data_dir", "prepared_dir", "executor", "tokenizer", "model", "teacher", "importance"),
        *("evaluation_pairs", "evaluation_candidates", "fsdp", "fsdp_config", "deepspeed"),
    }
)
# Keys of an account, a machine or a log. No card lists them; they may change in a continued run.
MACHINE = frozenset(
    {
        *("output_dir", "teacher_cache_dir", "push_checkpoints", "planned_text_tokens", "use_cpu"),
        *("attn_implementation", "save_total_limit", "save_on_each_node", "debug", "skip_memory_metrics"),
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("disable_tqdm", "logging_strategy", "logging_first_step", "log_on_each_node", "log_level"),
        *("log_level_replica", "include_num_input_tokens_seen"),
        *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
        *("dataloader_pin_memory", "ddp_timeout", "ddp_backend", "ddp_bucket_cap_mb", "ddp_static_graph"),
        *("ddp_find_unused_parameters", "ddp_broadcast_buffers"),
    }
)

_TAKE_OUT = "take it out"
_BATCHES = (
    "a batch is that of all processes: give 'global_batch_size' for its rows and 'max_tokens_per_forward' for what is "
    "encoded at once"
)
_EVALUATION = f"validation and pairs are evaluated in global batches of packed texts; {_TAKE_OUT}"
_HUB = "give 'push_checkpoints: ORG/NAME' to publish checkpoints, and publish the finished model by training/publish.py"
_COMPILE = "it compiles what packed batches never run; give 'compile: true'"
_TASKS = f"a stage always trains, and evaluates as 'eval_strategy' says; {_TAKE_OUT}"
_SEED = "every draw follows 'seed'; give that"
_ORDER = f"the order of the batches follows 'seed' on any number of processes and workers; {_TAKE_OUT}"
_PRECISION = f"validation is computed in the precision of the training, which 'bf16' sets; {_TAKE_OUT}"
_RESUMED = f"--resume goes on exactly where a run stopped; {_TAKE_OUT}"
# Keys of transformers that this trainer does not read, or that would harm: what to do instead.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"), _BATCHES),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only"), _EVALUATION),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"), _EVALUATION),
    **dict.fromkeys(("include_for_metrics", "label_names"), _EVALUATION),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _PRECISION),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
    "hub_token": "a token in a recipe would be copied to the run's folder; set the variable HF_TOKEN or run 'hf auth "
    "login'",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), _COMPILE),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _TASKS),
    "resume_from_checkpoint": "add --resume to the command to go on from the last checkpoint of 'output_dir', or give "
    "'model: FOLDER' to start from the weights of another",
    "data_seed": _SEED,
    **dict.fromkeys(("dataloader_drop_last", "train_sampling_strategy", "length_column_name"), _ORDER),
    **dict.fromkeys(("dataloader_in_order", "remove_unused_columns"), _ORDER),
    "dataloader_multiprocessing_context": f"workers start as Python's default on this system; {_TAKE_OUT}",
    "accelerator_config": f"nothing of it is read, for batches are divided over processes here; {_TAKE_OUT}",
    "parallelism_config": "give 'fsdp' or 'deepspeed', or start with 'accelerate launch --config_file'",
    "average_tokens_across_devices": f"the loss is that of the whole batch on every process; {_TAKE_OUT}",
    **dict.fromkeys(
        ("label_smoothing_factor", "neftune_noise_alpha"),
        f"the contrastive objective of packed texts has no such term; {_TAKE_OUT}",
    ),
    "torch_empty_cache_steps": "give 'max_tokens_per_forward' to bound memory",
    "logging_nan_inf_filter": f"a loss that is not finite ends the training; {_TAKE_OUT}",
    "use_cache": f"an embedding model generates nothing; {_TAKE_OUT}",
    "save_only_model": "it leaves checkpoints that cannot be resumed from; give 'save_strategy: no' to save the "
    "finished model alone",
    "enable_jit_checkpoint": f"SIGTERM and SIGINT write a checkpoint already; {_TAKE_OUT}",
    "ignore_data_skip": _RESUMED,
    "restore_callback_states_from_checkpoint": _RESUMED,
    "local_rank": f"the launcher tells it by the variable LOCAL_RANK; {_TAKE_OUT}",
}
_KNOWN = frozenset({*LEARNT, *RUNNING, *PLACES, *MACHINE, *REFUSED})

_SECRET_NAME = re.compile(
    r"(^|_)(api|access|auth|hub|hf|bearer|secret)_?(token|key)$|(^|_)(token|password|passwd|secret|credentials?)$",
    re.IGNORECASE,
)
# A token of the Hub, or a user and password in an address.
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{20,}|://[^/\s:@]+:[^/\s@]+@")


def check_given(keys: Mapping[str, Any]) -> None:
    """Refuses keys that would have no effect, whatever their value, and values that hold a secret.

    Args:
        keys: What a stage was told, by recipe and command line; keys without a value left out.

    Raises:
        UserError: If there is such a key; the message says what to do instead.
    """
    for key, value in keys.items():
        if key in REFUSED:
            raise UserError(f"key {key!r} has no effect: {REFUSED[key]}")
        if key not in _KNOWN:
            logger.warning("key %r is new in this version of transformers: it may have no effect here", key)
        check_no_secret(key, value)


def check_no_secret(key: str, value: Any) -> None:
    """Refuses a value that holds a secret: what a stage was told is copied to its folder.

    Raises:
        UserError: If it does; the message does not repeat it.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        # A mapping as the command line gives it; one that is no JSON is refused where it is read.
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if isinstance(value, Mapping):
        for name, each in value.items():
            if isinstance(each, str) and each and _SECRET_NAME.search(str(name)):
                raise _secret(key)
            check_no_secret(key, each)
    elif isinstance(value, list):
        for each in value:
            check_no_secret(key, each)
    elif isinstance(value, str) and _SECRET_VALUE.search(value):
        raise _secret(key)


def _secret(key: str) -> UserError:
    return UserError(
        f"key {key!r} holds a secret, which would be copied to the run's folder; take it out and set it as a variable "
        "of the environment, such as HF_TOKEN"
    )
