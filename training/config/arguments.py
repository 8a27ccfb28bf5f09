"""The keys of a recipe's stage: default, help, role and range of each, and what they mean together.

The role of a key says whether model cards list it, and whether it may change in a resumed run:

- ``learnt``: listed, must stay: it changes what is learnt, or how that is judged;
- ``running``: listed, may change: how the same is computed, watched or ended;
- ``path``: not listed, must stay: a path, or how many machines share the work;
- ``machine``: not listed, may change: an account, a machine or a log.
"""

# ruff: noqa: RUF009 (the helpers return fields)
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from modeling_f2llm.configuration_f2llm import F2LLMConfig, matryoshka_dims, usual_exits
from training.common.command import SECRET, SECRET_NAME
from training.common.errors import UserError
from training.config.checks import FOLLOWING_SCHEDULERS, SHAPE, check_keys_together, check_ranges
from training.data.instructions import TextFormat
from training.data.manifest import TASK_TYPES, WITH_NEGATIVES
from training.data.preparation.plan import ON_BAD_ROW

# The linear layers of attention and MLP.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# How the hidden channels and the layers that stay are chosen; see training/pruning/pruning.py.
HIDDEN_METHODS = ("published", "leading", "reordered")
LAYER_METHODS = ("first", "change")
# Metrics of these kinds are better the greater they are; all others are losses.
_SCORES = ("accuracy", "ndcg", "recall", "mrr")
# Packed texts have no padding.
_TOKENS_SEEN = {"true": "all", "all": "all", "non_padding": "all", "false": "no", "no": "no"}


def _key(role: str, default: Any, help_text: str, **rules: Any) -> Any:
    """Return a field whose metadata says all that must be known of a key.

    ``rules`` are ``least`` and ``most`` (inclusive), ``above`` and ``below`` (exclusive), ``choices``, and ``resume``
    where the role does not say whether the key may change in a resumed run.
    """
    return field(default=default, metadata={"help": help_text, "rules": {"role": role, **rules}})


learnt, running, path, machine = (partial(_key, role) for role in ("learnt", "running", "path", "machine"))


@dataclass
class LoraArguments:
    """The keys of a stage that trains an adapter. If ``model`` is an adapter, missing keys are taken from it."""

    lora: bool = learnt(False, "Train a low-rank adapter of 'model' only; the result names its base.", resume="never")
    lora_rank: int | None = learnt(None, "Rank of the adapter; 16 if left out.", least=1, resume="never")
    lora_alpha: int | None = learnt(None, "Updates are scaled by alpha / rank; 2 * rank if left out.", least=1)
    lora_dropout: float | None = learnt(None, "Dropout on the adapter's inputs; none if left out.", least=0, below=1)
    lora_target_modules: list[str] | None = learnt(None, "Linear layers to adapt; all if left out.", resume="never")
    lora_dora: bool = learnt(False, "DoRA: learn the length of each weight vector, too.", resume="never")
    lora_rslora: bool = learnt(False, "Scale by the square root of the rank, which large ranks need.")


@dataclass
class StageArguments(LoraArguments, TrainingArguments):
    """The keys of a training stage: those of transformers' ``TrainingArguments`` and these.

    A recipe names the global batch; how it is split over devices changes no result.
    """

    # Data
    manifest: str | None = path(None, "Manifest (YAML) of the sources.")
    data_dir: str | None = path(None, "Folder or hf:// address of the manifest's files, instead of its own.")
    data: list[str] | None = path(None, "Own files, folders or Hub data sets, read as they are, instead of a manifest.")
    columns: list[str] | None = learnt(None, "Columns of 'data' with other names: query=…, passage=…, negative=….")
    held_out_share: float = learnt(
        0.05, "Share of the queries of 'data' to score before and after on.", least=0, below=1
    )
    elsewhere: str | None = path(None, "Data of another kind to score on as well; default: names of CLDR; or 'none'.")
    replay: float = learnt(0.0, "Share of the rows that are replayed against forgetting.", least=0, below=1)
    replay_data: list[str] | None = path(None, "Data to replay; names of CLDR if left out.")
    manifest_stage: str | None = learnt(None, "Use the sources of this stage of the manifest, with its caps.")
    builder: str | None = learnt(None, "Builder of the manifest and its files if they are missing: cldr, gettext.")
    builder_options: str | None = learnt(None, "Options of the builder, as JSON.")
    sources: list[str] | None = learnt(None, "Names of the sources to train on, with * as in file names; default: all.")
    task_types: list[str] | None = learnt(None, f"Of {', '.join(TASK_TYPES)}; default: all.", choices=TASK_TYPES)
    cap: int | None = learnt(None, "Maximum rows per source (deterministic sample).", least=1)
    source_caps: str | None = learnt(None, "Maximum rows of single sources, as JSON: name (with *) to number.")
    source_temperature: float = learnt(1.0, "T of each source's share of an epoch, weight * rows^(1/T).", above=0)
    validation_share: float = learnt(0.01, "Share of the rows kept for validation.", least=0, most=1)
    prepared_dir: str | None = path(None, "Folder of tokenised sources, or a stage; default: OUTPUT_DIR/prepared.")
    executor: str | None = path(None, "Where data is prepared: local, ray, slurm or jobs; or JSON with its arguments.")
    on_bad_row: str = learnt("error", "Bad rows: error stops, quarantine sets them aside.", choices=ON_BAD_ROW)
    mine: bool = learnt(False, "Mine hard negatives before training, where rows have fewer than are drawn.")
    miner: str | None = path(None, "Folder, Hub name or earlier stage that finds them; default: 'model'.")
    reranker: str | None = path(None, "CrossEncoder, a folder or a Hub name, that refuses false negatives.")

    # Text
    tokenizer: str | None = path(None, "Name or folder of a tokenizer, or 'train'; the model's own if left out.")
    # A byte-level tokenizer has 256 bytes and three special tokens.
    tokenizer_vocab_size: int = learnt(8192, "Size of a tokenizer that is trained.", least=259, resume="never")
    max_length: int = learnt(1024, "Maximum tokens of a text, EOS included.", least=1)
    instructions: bool = learnt(True, "Put the source's instruction before queries (stage 2), or train on raw text.")
    document_instruction_share: float = learnt(0.3, "Share of symmetric documents with instruction.", least=0, most=1)
    query_instruction: str | None = learnt(None, "Of the saved prompt, and of sources without one.", resume="sample")

    # Model
    model: str | None = path(None, "Folder, Hub name or earlier stage of the recipe to start from.")
    model_config: str | None = learnt(None, "A new model: F2LLMConfig fields, or 'family', as JSON.", resume="never")
    model_family: str | None = running(None, "Published shape of 'model', such as f2llm-v2-0.6b, for --dry-run.")
    attn_implementation: str | None = machine(None, "Attention backend; chosen by device and precision if left out.")
    compile: bool = running(False, "Compile the layers; needs minutes of warm-up, and a C++ compiler on a CPU.")

    # Batches
    global_batch_size: int = learnt(512, "Maximum rows of a batch over all processes.", least=1)
    max_tokens_per_forward: int | None = running(None, "Maximum tokens encoded at once.", least=1, resume="chunks")
    num_hard_negatives_retrieval: int = learnt(7, "Negatives per retrieval row.", least=0)
    num_hard_negatives_clustering: int = learnt(9, "Negatives per clustering row.", least=0)
    num_hard_negatives_classification: int = learnt(1, "Negatives per classification row.", least=0)
    min_hard_negatives: int | None = learnt(None, "Negatives a row must have, if fewer than are drawn.", least=0)

    # Objective
    temperature: float = learnt(0.05, "Divisor of the cosines.", above=0)
    matryoshka: bool = learnt(True, "Train nested widths.")
    matryoshka_min_dim: int = learnt(8, "Narrowest width trained, a power of two.", least=1)
    matryoshka_dimensions: list[int] | None = learnt(None, "Widths trained; powers of two if left out.")
    mask_duplicates: bool = learnt(False, "Exclude rows of the same query or positive from in-batch negatives.")
    mask_false_negatives: float | None = learnt(
        None, "Leave out negatives whose cosine exceeds the positive's by more than this.", least=-1, most=1
    )
    gather_gradients: bool = learnt(True, "Positives learn from the in-batch term; false: as published on GPUs.")
    spread_weight: float = learnt(0.0, "Factor of a term that spreads unrelated texts of retrieval.", least=0)
    quantized: str | None = learnt(None, "Factors of terms on quantized vectors, as JSON: int8 and binary.")
    embedding_ranks: list[int] | None = learnt(
        None, "Factorise the token embeddings; ranks trained, one a step.", resume="never"
    )
    exit_layers: list[str] | None = learnt(None, "Layers trained as exits, or auto: 1, 2, 4, 8, 16, 24, …, the last.")

    learning_rate_by_size: str | None = learnt(
        None, "Rates by most parameters, as JSON, if none is given; lora: times 10."
    )

    # Distillation
    teacher: str | None = path(None, "Folder, Hub name or earlier stage whose embeddings the model learns.")
    distillation_weight: float = learnt(1.0, "Factor of the distillation term.", least=0)
    score_distillation_weight: float = learnt(
        0.0, "Factor of the KL divergence from its scores, or, without it, those of the data.", least=0
    )
    teacher_temperature: float | None = learnt(
        None, "Their divisor; 'temperature' if left out, 1 for those of the data.", above=0
    )
    teacher_query_template: str | None = learnt(None, "How another teacher reads texts: {text}, {instruction}.")
    teacher_document_template: str | None = learnt(None, "Template for texts without instruction: {text}.")
    teacher_cache_dir: str | None = machine(None, "Folder that keeps the teacher's embeddings; none if left out.")
    teacher_projection: bool = learnt(False, "Learn a map to the teacher's dimensions; not saved.", resume="never")

    # Pruning
    prune_to: str | None = learnt(None, "Cut 'model' to a shape or a budget, as JSON; see training/pruning/README.md.")
    prune_hidden: str | None = learnt(None, "Channels: leading (default after matryoshka), …", choices=HIDDEN_METHODS)
    prune_layers: str = learnt("first", "Layers to keep: first, or most change.", choices=LAYER_METHODS)
    calibration_texts: int = learnt(1024, "Texts of the sources whose activations are measured.", least=1)
    importance: str | None = path(None, "Earlier measurement: importance.safetensors, its folder, or an earlier stage.")
    trim_vocabulary: bool = learnt(False, "Keep only the tokens that the sources use, all bytes and special tokens.")

    # Evaluation
    evaluation_pairs: str | None = path(None, "File of query, passage and maybe lang, script.", resume="evaluation")
    evaluation_candidates: str | None = path(None, "File of more passages to find them among.", resume="evaluation")
    evaluation_sample: int = running(0, "Pairs scored at each evaluation in training, too.", least=0, resume="sample")
    evaluation_sample_candidates: int = running(2000, "Maximum candidates of these pairs.", least=1, resume="sample")
    early_stopping_patience: int | None = running(None, "Stop after so many evaluations without improvement.", least=1)
    early_stopping_threshold: float = running(0.0, "What a change must exceed to be an improvement.", least=0)

    # Hub and planning
    push_checkpoints: str | None = machine(None, "Hub repository for every checkpoint; create it first if private.")
    planned_text_tokens: int = machine(128, "Mean tokens of a text that --dry-run assumes for remote data.", least=1)

    # Keys of transformers with another default, or of a type that HfArgumentParser reads only in part.
    logging_steps: float = running(50, "Log every so many steps.", least=0)
    logging_first_step: bool = machine(True, "Log the first step.")
    report_to: list[str] | None = machine(None, "Trackers, 'all' or 'none'; default: TensorBoard if it is installed.")
    include_num_input_tokens_seen: str = machine("no", "Count the tokens trained on: all or no.", choices=("all", "no"))
    optim_target_modules: list[str] | None = learnt(None, "Modules that GaLore or APOLLO adapt.", resume="never")
    # Releases of transformers before 5.23 have these under their older names only.
    activation_checkpointing: bool | None = running(None, "Compute layers again in the backward pass, to save memory.")
    activation_checkpointing_kwargs: dict[str, Any] | str | None = running(None, "Its options, as JSON.")
    liger_kernel_config: str | None = learnt(None, "Which Liger kernels are used, as JSON: name to true or false.")
    # All weights are used in every step and no buffer changes: DDP's work for either would cost time for nothing.
    ddp_find_unused_parameters: bool | None = machine(False, "Passed to torch's DistributedDataParallel.")
    ddp_broadcast_buffers: bool | None = machine(False, "Passed to torch's DistributedDataParallel.")

    def __post_init__(self) -> None:
        self._settle_data()
        self._settle()
        self._settle_direction()
        super().__post_init__()
        check_ranges(self)
        check_keys_together(self)

    def _settle_data(self) -> None:
        """Name the manifest that is made of own data: it is known before anything is built."""
        if not self.data:
            return
        made = "mixed/manifest.yaml" if self.replay else "data/manifest.yaml"
        if self.manifest not in (None, made := str(Path(self.output_dir) / made)):
            raise UserError("keys 'data' and 'manifest' both say what to train on; give one of them")
        self.manifest = made

    def _settle(self) -> None:
        """Give the keys the values that transformers reads."""
        if self.report_to is None:
            self.report_to = ["tensorboard"] if is_tensorboard_available() else []
        # The older names mean the same.
        newer, name = self.activation_checkpointing, "activation_checkpointing_kwargs"
        self.activation_checkpointing = self.gradient_checkpointing if newer is None else newer
        self.gradient_checkpointing = self.activation_checkpointing
        name = name if getattr(self, name) is not None else "gradient_checkpointing_kwargs"
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = self.mapping(name) or None
        counted = str(self.include_num_input_tokens_seen).lower()
        self.include_num_input_tokens_seen = _TOKENS_SEEN.get(counted, counted)
        # Documented as a truth value, but declared as a text.
        self.fsdp = {"true": True, "false": False}.get(str(self.fsdp).lower(), self.fsdp)
        # Transformers accepts any text here, and fails in the training.
        self.mapping("lr_scheduler_kwargs")
        # A text alone is a pattern or 'all-linear'.
        if len(self.optim_target_modules or ()) == 1:
            (self.optim_target_modules,) = self.optim_target_modules
        if self.trackio_static_space_id == "false":
            self.trackio_static_space_id = False
        if self.use_liger_kernel or self.liger_kernel_config is not None:
            # Liger's default replaces the forward pass of a language model by one that computes its loss.
            self.liger_kernel_config = {"fused_linear_cross_entropy": False, **self.mapping("liger_kernel_config")}

    def _settle_direction(self) -> None:
        """Derive the direction of the followed metric from what it measures; refuse the other one."""
        follows = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) in FOLLOWING_SCHEDULERS
        metric = self.metric_for_best_model or ("loss" if follows or self.load_best_model_at_end else None)
        if metric is None:
            return
        greater = greater_is_better(metric)
        if self.greater_is_better is (not greater):
            what = f"of {metric!r} the {'greater' if greater else 'lower'} value is better"
            raise UserError(f"key 'greater_is_better': {what}; give '{str(greater).lower()}' or take the key out")
        self.greater_is_better = greater
        if follows:
            mode, given = "max" if greater else "min", self.mapping("lr_scheduler_kwargs")
            if given.get("mode", mode) != mode:
                raise UserError(f"key 'lr_scheduler_kwargs': {metric!r} wants 'mode: {mode}'; give that or take it out")
            self.lr_scheduler_kwargs = {**given, "mode": mode}

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a copy of the value of a key that holds a mapping, which a recipe gives as JSON."""
        value = getattr(self, name) or "{}"
        try:
            value = json.loads(value) if isinstance(value, str) else {**value}
        except ValueError as error:
            raise UserError(f"key {name!r} is not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"key {name!r} must map names to values, got {value!r}")
        return value

    @property
    def num_hard_negatives(self) -> dict[str, int]:
        """Hard negatives drawn per row, by task type."""
        return {kind: getattr(self, f"num_hard_negatives_{kind}") for kind in WITH_NEGATIVES}

    @property
    def prepared_folder(self) -> Path:
        """Folder of this stage's prepared sources."""
        return Path(self.prepared_dir or Path(self.output_dir) / "prepared")

    @property
    def prunes(self) -> bool:
        """Whether the stage cuts a model instead of training one."""
        return self.prune_to is not None or self.trim_vocabulary

    @property
    def learns_from_teacher(self) -> bool:
        """Whether a term of the loss is the teacher's: its weight is not 0."""
        return self.needs_teacher and self.distillation_weight + self.score_distillation_weight > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the stage reads its teacher's embeddings, to learn from them or to find false negatives."""
        return self.teacher is not None and not self.prunes and (self.distillation_weight > 0 or self.compares_scores)

    @property
    def learns_scores_of_data(self) -> bool:
        """Whether the scores to learn are those that the data has, for want of a teacher."""
        return self.score_distillation_weight > 0 and self.teacher is None and not self.prunes

    @property
    def compares_scores(self) -> bool:
        """Whether the teacher's similarities matter, those of its whole width."""
        return self.score_distillation_weight > 0 or self.mask_false_negatives is not None

    @property
    def draws_dropout(self) -> bool:
        """Whether the stage asks for dropout; a model that it starts from may ask for it, too."""
        return bool(self.lora_dropout or self.mapping("model_config").get("attention_dropout"))

    @property
    def lora_keys(self) -> list[str]:
        """The keys of the adapter that were given, other than ``lora``; False says as little as a missing key."""
        return [each.name for each in fields(LoraArguments)[1:] if getattr(self, each.name) not in (None, False)]

    @property
    def chooses_by_pairs(self) -> bool:
        """Whether the evaluation pairs decide which model is the best."""
        return (self.metric_for_best_model or "").removeprefix("eval_").startswith("pairs_")

    @property
    def text_format(self) -> TextFormat:
        """The templates of a teacher with another tokenizer."""
        given = {name: getattr(self, f"teacher_{name}") for name in ("query_template", "document_template")}
        return TextFormat(**{name: template for name, template in given.items() if template is not None})

    def cap_of(self, source: str) -> int | None:
        """Return the maximum rows of a source: the smallest cap that fits its name; None for all."""
        fitting = [int(cap) for pattern, cap in self.mapping("source_caps").items() if fnmatch(source, pattern)]
        return min([*fitting, *([self.cap] if self.cap is not None else [])], default=None)

    def train_dims(self, hidden_size: int) -> list[int] | None:
        """Return the widths to train a model of this width at, widest first; None for the full width only."""
        if not self.matryoshka:
            return None
        if self.matryoshka_dimensions is None:
            try:
                return matryoshka_dims(hidden_size, self.matryoshka_min_dim)
            except ValueError as error:
                raise UserError(f"key 'matryoshka_min_dim': {error}") from None
        if wrong := [dim for dim in self.matryoshka_dimensions if not 1 <= dim <= hidden_size]:
            raise UserError(f"key 'matryoshka_dimensions': {wrong} do not fit a model of {hidden_size} dimensions")
        # The full width is what the model is used at when nobody truncates.
        return sorted({*self.matryoshka_dimensions, hidden_size}, reverse=True)

    def train_exits(self, layers: int) -> list[int] | None:
        """Return the numbers of layers after which a model of so many is trained, ascending; None for the last only."""
        if not self.exit_layers:
            return None
        if self.exit_layers == ["auto"]:
            return usual_exits(layers)
        if wrong := [each for each in self.exit_layers if not each.isdecimal() or not 1 <= int(each) <= layers]:
            raise UserError(f"key 'exit_layers': {wrong} do not fit a model of {layers} layers; give numbers, or auto")
        return sorted({*map(int, self.exit_layers), layers})

    def check_ranks(self, config: F2LLMConfig) -> None:
        """Refuse ranks that the token embeddings of a model cannot have."""
        most, ranks = min(config.hidden_size, config.vocab_size), self.embedding_ranks
        if ranks and max(ranks) > most:
            raise UserError(f"key 'embedding_ranks': {ranks} do not fit the model; give ranks up to {most}")

    def check_family(self, config: F2LLMConfig) -> None:
        """Refuse a model whose shape is not that of ``model_family``."""
        if self.model_family is None:
            return
        published = F2LLMConfig.from_family(self.model_family)
        for name in SHAPE:
            has, wants = getattr(config, name), getattr(published, name)
            if has != wants:
                what = f"model {self.model!r} is not {self.model_family}: its {name} is {has}, not {wants}"
                raise UserError(f"{what}; correct 'model' or 'model_family'")


def greater_is_better(metric: str) -> bool:
    """Return whether greater values of an evaluation metric, such as ``pairs_accuracy_dim64``, are better."""
    name = metric.removeprefix("eval_")
    # A source's loss, even if the source is named after a score.
    return not name.startswith("source/") and any(score in name for score in _SCORES)


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


def _keys_by(rule: str, value: str) -> frozenset[str]:
    return frozenset(each.name for each in fields(StageArguments) if each.metadata.get("rules", {}).get(rule) == value)


LEARNT, RUNNING, PATHS, MACHINE = (
    _keys_by("role", role) | {*names.split()} for role, names in _OF_TRANSFORMERS.items()
)
# Keys that cannot change in a resumed run, because its checkpoints hold what follows from them.
NEVER = _keys_by("resume", "never") | {"optim", "optim_args", "fp16"}
# Keys that may change unless evaluation pairs choose the best model: scores before and after would not compare.
SAMPLE = _keys_by("resume", "sample")
# Keys that may change unless dropout is drawn: it depends on how the texts are divided.
CHUNKS = _keys_by("resume", "chunks")
# Keys of the finished model's evaluation, which may change afterwards.
EVALUATION = _keys_by("resume", "evaluation")

# All other keys of transformers are refused: they would have no effect, or do harm. What to do instead:
_INSTEAD = {
    "per_device_|gradient_acc|auto_find|torch_empty": "give 'global_batch_size', the rows over all processes, and "
    "'max_tokens_per_forward', what is encoded at once",
    "hub_token": "set the variable HF_TOKEN or run 'hf auth login'",
    "push_to_hub|hub_": "give 'push_checkpoints: ORG/NAME' (create it first if private), or use training/publish.py",
    "torch_compile": "give 'compile: true'",
    "resume_|ignore_data|restore_": "add --resume to the command, or give 'model: FOLDER' to start from a checkpoint",
    "data_seed|dataloader_(drop|in_)|length_|train_sampling": "give 'seed', which decides the order of the batches",
    "parallelism": "give 'fsdp' or 'deepspeed', or start with 'accelerate launch --config_file'",
    "save_only": "give 'save_strategy: no' to save the finished model alone",
    "": "this trainer packs texts and divides batches itself; take it out",
}
REFUSED = {
    each.name: next(remedy for pattern, remedy in _INSTEAD.items() if re.match(pattern, each.name))
    for each in fields(StageArguments)
    if each.name not in LEARNT | RUNNING | PATHS | MACHINE
}


def check_given(keys: Mapping[str, Any]) -> None:
    """Refuse keys given to a stage that would have no effect with any value, and values that hold a secret."""
    for key, value in keys.items():
        if key in REFUSED:
            raise UserError(f"key {key!r} has no effect: {REFUSED[key]}")
        if _holds_secret(value):
            raise UserError(f"key {key!r} holds a secret; set it as an environment variable, such as HF_TOKEN")


def _holds_secret(value: Any) -> bool:
    # The command line gives a mapping as JSON.
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    names = re.findall(r'"([^"]+)": *"[^"]', text)
    return bool(SECRET.search(text)) or any(map(SECRET_NAME.search, names))
