"""What a stage of a recipe may say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from modeling_f2llm.configuration_f2llm import F2LLMConfig, matryoshka_dims
from training.common.errors import UserError
from training.common.yaml_file import unknown_key
from training.config.evaluation_arguments import EvaluationArguments
from training.config.lora_arguments import LoraArguments
from training.config.number_ranges import check_finite, check_ranges
from training.config.planning_arguments import PlanningArguments
from training.config.pruning_arguments import PruningArguments
from training.config.publishing_arguments import PublishingArguments
from training.config.teacher_arguments import TeacherArguments
from training.config.transformers_arguments import TransformersArguments

# Optimizers that read the keys of Adam, and no options of their own.
_WITHOUT_OPTIONS = ("adamw_torch", "adafactor")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


@dataclass
class StageArguments(
    TeacherArguments,
    PruningArguments,
    LoraArguments,
    EvaluationArguments,
    PublishingArguments,
    PlanningArguments,
    TransformersArguments,
    TrainingArguments,
):
    """The keys of a training stage: those of transformers' ``TrainingArguments`` and these.

    A recipe names the global batch; how it is split over devices is not its business. What each key does, and which of
    transformers' keys a recipe must not give, is in :mod:`training.config.stage_keys`.
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
            "it unless dropout is drawn. A process's whole share of a batch if left out."
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

    def __post_init__(self) -> None:
        # Before transformers rounds them; again for those in mappings, which it reads.
        check_finite(self)
        self._settle()
        self._settle_direction()
        super().__post_init__()
        check_finite(self)
        check_ranges(self)
        self._check_computation()
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
        if self.tokenizer == "train" and self.model is not None:
            raise UserError("key 'tokenizer': a model that is trained already needs its own; leave the key out")
        if (self.model is None) == (self.model_config is None):
            raise UserError(
                "give exactly one of the keys 'model' (what to start from) and 'model_config' (a new model)"
            )

    def _check_computation(self) -> None:
        if self.max_tokens_per_forward is not None and self.max_tokens_per_forward < self.max_length:
            raise UserError(
                f"key 'max_tokens_per_forward' ({self.max_tokens_per_forward}) must hold the longest text; give at "
                f"least 'max_length' ({self.max_length})"
            )
        if self.fp16 and self.device.type == "cpu":
            raise UserError("key 'fp16' has no effect on a CPU; give 'bf16: true', or take it out")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError(
                "key 'use_liger_kernel' needs the package liger-kernel; install it with 'pip install liger-kernel', or "
                "take the key out"
            )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise UserError(
                "key 'dataloader_persistent_workers' needs workers; give 'dataloader_num_workers: 2', or take it out"
            )
        if self.optim_args is not None and self.optim.value.startswith(_WITHOUT_OPTIONS):
            raise UserError(
                f"key 'optim_args' has no effect on 'optim: {self.optim.value}'; give 'adam_beta1', 'adam_epsilon' and "
                "'weight_decay', or take it out"
            )
        if self.fsdp_config and not self.fsdp:
            raise UserError("key 'fsdp_config' has no effect without 'fsdp: true'; add that, or take it out")

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
        fitting = [int(cap) for pattern, cap in self._mapping("source_caps").items() if fnmatch(source, pattern)]
        return min([*fitting, *([self.cap] if self.cap is not None else [])], default=None)

    def _check_mappings(self) -> None:
        known = [*(field.name for field in fields(F2LLMConfig)), "family"]
        for key in self._mapping("model_config"):
            if key not in known:
                raise unknown_key("key 'model_config' (fields of F2LLMConfig)", key, known)
        if self.builder_fields() and self.builder is None:
            raise UserError("key 'builder_options' has no effect without 'builder'; name the builder or take it out")
        for pattern, cap in self._mapping("source_caps").items():
            # 1e4 is a number with a fraction to YAML and JSON.
            whole = isinstance(cap, float) and cap.is_integer()
            if not (isinstance(cap, int) or whole) or isinstance(cap, bool) or cap < 1:
                raise UserError(f"key 'source_caps': the cap of {pattern!r} must be a positive integer, got {cap!r}")

    def _mapping(self, key: str) -> dict[str, Any]:
        """The value of a key that holds a mapping, a copy; a recipe gives it as JSON.

        Raises:
            UserError: If it is no JSON object.
        """
        value = getattr(self, key) or "{}"
        try:
            mapping = json.loads(value, parse_constant=_refuse_constant) if isinstance(value, str) else {**value}
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
