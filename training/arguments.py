"""What a stage of a recipe may say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from modeling_f2llm.configuration_f2llm import F2LLMConfig, matryoshka_dims
from training.errors import UserError
from training.evaluation_arguments import EvaluationArguments
from training.lora_arguments import LoraArguments
from training.planning_arguments import PlanningArguments
from training.pruning_arguments import PruningArguments
from training.publishing_arguments import PublishingArguments
from training.teacher_arguments import TeacherArguments
from training.yaml_file import unknown_key

__all__ = ["StageArguments"]


# A byte-level tokenizer has 256 bytes and three special tokens.
_FEWEST_TOKENS = 259


# Keys of Trainer's own steps, evaluation and loaders, which are others here.
_WITHOUT_EFFECT = (
    *("neftune_noise_alpha", "label_smoothing_factor", "dataloader_drop_last", "auto_find_batch_size"),
    *("eval_accumulation_steps", "per_device_eval_batch_size", "torch_empty_cache_steps", "train_sampling_strategy"),
)


@dataclass
class StageArguments(
    TeacherArguments,
    PruningArguments,
    LoraArguments,
    EvaluationArguments,
    PublishingArguments,
    PlanningArguments,
    TrainingArguments,
):
    """The keys of a training stage: those of transformers' ``TrainingArguments`` and these.

    A recipe names the global batch; how it is split over devices is not its business, so
    ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` have no effect here and are refused.
    """

    # Data
    manifest: str | None = field(default=None, metadata={"help": "Manifest (YAML) of the sources."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder or hf:// address of the manifest's files, instead of its own."}
    )
    manifest_stage: str | None = field(
        default=None, metadata={"help": "Take the sources that the manifest gives this stage, under its caps."}
    )
    builder: str | None = field(
        default=None,
        metadata={"help": "Builder that makes the manifest and its files if they are missing (cldr, gettext)."},
    )
    builder_options: str | None = field(
        default=None, metadata={"help": "Options of the builder as JSON: name to value; its defaults if left out."}
    )
    sources: list[str] | None = field(
        default=None, metadata={"help": "Names of the sources to train on, * as in file names; all if left out."}
    )
    task_types: list[str] | None = field(
        default=None,
        metadata={"help": "Task types to train on: retrieval, clustering, classification; all if left out."},
    )
    cap: int | None = field(default=None, metadata={"help": "Rows per source at most, drawn by key."})
    source_caps: str | None = field(
        default=None, metadata={"help": "Rows at most of single sources as JSON: name (* as in file names) to number."}
    )
    validation_share: float = field(default=0.01, metadata={"help": "Share of the rows kept for validation."})
    prepared_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where tokenised sources are kept, or an earlier stage that has the same; OUTPUT_DIR/prepared if "
            "left out."
        },
    )

    executor: str | None = field(
        default=None,
        metadata={
            "help": "Where data is prepared: local, ray, slurm or jobs; or JSON of name, workers and datatrove's own "
            "arguments."
        },
    )
    on_bad_row: str = field(
        default="error", metadata={"help": "Bad rows of the data: error stops, quarantine puts them aside."}
    )

    # Text
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a tokenizer, or 'train'; the model's own if left out."},
    )
    tokenizer_vocab_size: int = field(default=8192, metadata={"help": "Tokens of a tokenizer that is trained."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of a text at most, EOS included."})
    instructions: bool = field(
        default=True, metadata={"help": "Put the source's instruction before queries (stage 2), or train on raw text."}
    )
    document_instruction_share: float = field(
        default=0.3, metadata={"help": "Share of the documents of symmetric sources that carry the instruction too."}
    )
    query_instruction: str | None = field(
        default=None,
        metadata={
            "help": "Instruction of the saved model's query prompt, empty for no prompt. If left out: the one that all "
            "sources share, else that of the start model, else the published one. With --resume it is given to a "
            "finished model, too."
        },
    )

    # Model
    model: str | None = field(
        default=None, metadata={"help": "Folder, Hub name or earlier stage of the recipe to start from."}
    )
    model_config: str | None = field(
        default=None,
        metadata={"help": "A new model instead: F2LLMConfig fields as JSON, with 'family' to start from a known size."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend; chosen by device and precision if left out."}
    )

    compile: bool = field(
        default=False,
        metadata={
            "help": "Compile the layers: faster steps after a warm-up of minutes; needs a C++ compiler on a CPU."
        },
    )

    # Batches
    global_batch_size: int = field(default=512, metadata={"help": "Rows of a batch over all processes, at most."})
    max_tokens_per_forward: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that a process encodes at once, at most; memory follows it, the result does not depend on "
            "it. A process's whole share of a batch if left out."
        },
    )
    num_hard_negatives_retrieval: int = field(default=7, metadata={"help": "Hard negatives per retrieval row."})
    num_hard_negatives_clustering: int = field(default=9, metadata={"help": "Hard negatives per clustering row."})
    num_hard_negatives_classification: int = field(
        default=1, metadata={"help": "Hard negatives per classification row."}
    )

    # Objective
    temperature: float = field(default=0.05, metadata={"help": "Divisor of the cosines."})
    matryoshka: bool = field(default=True, metadata={"help": "Train nested widths."})
    matryoshka_min_dim: int = field(default=8, metadata={"help": "Narrowest width trained, a power of two."})
    matryoshka_dimensions: list[int] | None = field(
        default=None, metadata={"help": "Widths trained; powers of two from matryoshka_min_dim if left out."}
    )
    mask_duplicates: bool = field(
        default=False,
        metadata={"help": "Leave rows with the same query or positive text out of each other's in-batch negatives."},
    )

    gather_gradients: bool = field(
        default=True,
        metadata={"help": "Let positives learn from the in-batch term; false: as published on several GPUs."},
    )

    # Other defaults than those of transformers
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step."})
    # HfArgumentParser reads a union of three only with None in front.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default=None, metadata={"help": "Trackers to log to; TensorBoard if it is installed and this is left out."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Without effect."})
    # All weights are used in every step and no buffer changes: what DDP would do about either costs time for nothing.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See DDP."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "See DDP."})

    def __post_init__(self) -> None:
        if self.report_to is None:
            self.report_to = ["tensorboard"] if is_tensorboard_available() else []
        super().__post_init__()
        self._check_batching()
        self._check_ranges()
        self._check_mappings()
        self._check_teacher()
        self._check_pruning()
        self._check_lora()
        if self.prunes and self.teacher is not None:
            raise UserError(
                "key 'teacher' has no effect in a stage that cuts a model; give it to the stage that trains the result"
            )
        self._check_evaluation()
        self._check_planning()
        self._check_publishing()
        if self.push_to_hub:
            raise UserError(
                "key 'push_to_hub': give 'push_checkpoints' to publish checkpoints, and publish the finished model by "
                "itself"
            )
        if self.tokenizer == "train" and self.model is not None:
            raise UserError("key 'tokenizer': a model that is trained already needs its own; leave the key out")
        if (self.model is None) == (self.model_config is None):
            raise UserError(
                "give exactly one of the keys 'model' (what to start from) and 'model_config' (a new model)"
            )

    def _check_batching(self) -> None:
        if self.per_device_train_batch_size != 8 or self.gradient_accumulation_steps != 1:
            raise UserError(
                "keys 'per_device_train_batch_size' and 'gradient_accumulation_steps' have no effect; "
                "give 'global_batch_size'"
            )
        defaults = {each.name: each.default for each in fields(self)}
        for key in _WITHOUT_EFFECT:
            if getattr(self, key) != defaults[key]:
                raise UserError(f"key {key!r} has no effect on global batches of packed texts; take it out")
        if self.save_only_model:
            raise UserError("key 'save_only_model' leaves checkpoints that cannot be resumed from; take it out")
        if self.torch_compile:
            raise UserError("key 'torch_compile' compiles what packed batches never run; give 'compile: true'")
        if self.global_batch_size < 1:
            raise UserError(f"key 'global_batch_size' must be at least 1, got {self.global_batch_size}")
        if self.max_tokens_per_forward is not None and self.max_tokens_per_forward < self.max_length:
            raise UserError(
                f"key 'max_tokens_per_forward' ({self.max_tokens_per_forward}) must hold the longest text; give at "
                f"least 'max_length' ({self.max_length})"
            )

    def _check_ranges(self) -> None:
        for key in ("validation_share", "document_instruction_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"key {key!r} must lie between 0 and 1, got {getattr(self, key)}")
        least = {"max_length": 1, "matryoshka_min_dim": 1, "cap": 1, "tokenizer_vocab_size": _FEWEST_TOKENS}
        least |= {"seed": 0, "dataloader_num_workers": 0}
        for key, smallest in least.items():
            value = getattr(self, key)
            if value is not None and value < smallest:
                raise UserError(f"key {key!r} must be at least {smallest}, got {value}")
        for task_type, count in self.num_hard_negatives.items():
            if count < 0:
                raise UserError(f"key 'num_hard_negatives_{task_type}' must not be negative, got {count}")
        if not self.temperature > 0:
            raise UserError(f"key 'temperature' must be positive, got {self.temperature}")

    @property
    def num_hard_negatives(self) -> dict[str, int]:
        """Hard negatives drawn per row, by task type."""
        return {
            "retrieval": self.num_hard_negatives_retrieval,
            "clustering": self.num_hard_negatives_clustering,
            "classification": self.num_hard_negatives_classification,
        }

    @property
    def prepared_folder(self) -> Path:
        """Where this stage's prepared sources lie."""
        return Path(self.prepared_dir or Path(self.output_dir) / "prepared")

    def model_config_fields(self) -> dict[str, Any]:
        """The fields of ``model_config``."""
        return self._mapping("model_config")

    def builder_fields(self) -> dict[str, Any]:
        """The options of ``builder_options``."""
        return self._mapping("builder_options")

    def prune_to_fields(self) -> dict[str, Any]:
        """The shape of ``prune_to``."""
        return self._mapping("prune_to")

    def cap_of(self, source: str) -> int | None:
        """Rows of a source that this stage uses at most: the smallest cap that fits its name, None for all."""
        fitting = [cap for pattern, cap in self._mapping("source_caps").items() if fnmatch(source, pattern)]
        return min([*fitting, *([self.cap] if self.cap is not None else [])], default=None)

    def _check_mappings(self) -> None:
        known = [*(field.name for field in fields(F2LLMConfig)), "family"]
        for key in self._mapping("model_config"):
            if key not in known:
                raise unknown_key("key 'model_config' (fields of F2LLMConfig)", key, known)
        if self.builder_fields() and self.builder is None:
            raise UserError("key 'builder_options' has no effect without 'builder'; name the builder or take it out")
        for pattern, cap in self._mapping("source_caps").items():
            if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
                raise UserError(f"key 'source_caps': the cap of {pattern!r} must be a positive integer, got {cap!r}")

    def _mapping(self, key: str) -> dict[str, Any]:
        """The value of a key that holds a mapping, written as JSON.

        Raises:
            UserError: If it is no JSON object.
        """
        try:
            mapping = json.loads(getattr(self, key) or "{}")
        except ValueError as error:
            raise UserError(f"key {key!r} is not valid JSON ({error})") from None
        if not isinstance(mapping, dict):
            raise UserError(f"key {key!r} must map names to values, got {mapping!r}")
        return mapping

    def train_dims(self, hidden_size: int) -> list[int] | None:
        """Widths to train a model of this width at, widest first; None for the full width only.

        Raises:
            UserError: If a width does not fit the model.
        """
        if not self.matryoshka:
            return None
        if self.matryoshka_dimensions is None:
            try:
                return matryoshka_dims(hidden_size, self.matryoshka_min_dim)
            except ValueError as error:
                raise UserError(f"key 'matryoshka_min_dim': {error}") from None
        wrong = [dim for dim in self.matryoshka_dimensions if not 1 <= dim <= hidden_size]
        if wrong:
            raise UserError(
                f"key 'matryoshka_dimensions': {wrong} do not fit a model of {hidden_size} dimensions; "
                f"give widths from 1 to {hidden_size}"
            )
        # The full width is what the model is used at when nobody truncates.
        return sorted({*self.matryoshka_dimensions, hidden_size}, reverse=True)
