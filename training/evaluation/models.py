"""Models as mteb sees them: loaded as its registry says, each width and precision a view of the same embeddings."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import mteb
import torch
from huggingface_hub import HfApi

# Private, but the only way to join titles, texts and instructions exactly as mteb's own models do.
from mteb._create_dataloaders import create_dataloader
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt, get_prompt_name
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_implementations.qwen3_models import instruction_template as qwen3_template
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from modeling_f2llm.prompts import TEMPLATE
from modeling_f2llm.tokenizer import append_eos
from training.common.errors import UserError
from training.evaluation.encoding import EmbeddingStore, Floats, calibrate, quantized, unit_length
from training.evaluation.records import DEFAULT_MAX_LENGTH, ModelRecord
from training.models.devices import SharedEncoder
from training.models.encoders import (
    TRUST_OPTION,
    exit_sizes,
    has_factors,
    limit_length,
    load_encoder,
    pooling_of,
    trained_exits,
    unused_parameters,
    with_exits,
)
from training.models.model_folder import user_error
from training.models.model_ref import ModelRef, reads_as_ours, resolve, revisions_in

logger = logging.getLogger("training")

# All sizes have the same prompts for mteb's tasks.
_PUBLISHED = "codefuse-ai/F2LLM-v2-80M"
# mteb's loaders that load a SentenceTransformer and add prompts, as is done here, and the options that they add.
_INSTRUCTION = {"instruction_template": "{instruction}"}
_LOADERS: dict[str, dict[str, Any]] = {
    "SentenceTransformerEncoderWrapper": {},
    "sentence_transformers_loader": {},
    "InstructSentenceTransformerModel": _INSTRUCTION,
    "instruct_loader": _INSTRUCTION,
    "q3e_instruct_loader": {"instruction_template": qwen3_template, "apply_instruction_to_passages": False},
}
# Options of mteb's registry that are supported, and those that do not concern texts.
_SUPPORTED = {
    *("model_kwargs", "tokenizer_kwargs", "processor_kwargs", "config_kwargs", "device", "embed_dim", "include_prompt"),
    *("padding_side", "add_eos_token", "max_seq_length", "trust_remote_code"),
    *("model_prompts", "prompts_dict", "instruction_template", "apply_instruction_to_passages"),
    *("num_frames", "max_frames", "min_frames", "fps", "max_samples", "target_sampling_rate"),
}
# Similarities of queries and documents computed at once: 512 MiB of float32.
_SIMILARITIES = 1 << 27


@dataclass(frozen=True)
class Prompts:
    """Prompts before the texts of a task, by mteb's names: task, type of task, ``query``, ``document``."""

    own: dict[str, str] = field(default_factory=dict)  # whole prompts
    by_task: dict[str, Any] | None = None  # instructions
    # Text with ``{instruction}``, or (in mteb's registry) a function of instruction and type of prompt.
    template: Any = None
    on_documents: bool = False  # whether documents get the template, too
    default: str = ""  # where no other fits


@dataclass(frozen=True)
class EvaluatedModel:
    """A loaded model; mteb keeps results by name, revision and experiment of ``meta``."""

    record: ModelRecord
    store: EmbeddingStore
    meta: ModelMeta
    prompts: Prompts
    exits: Mapping[int, ModelRecord] = field(default_factory=dict)  # by layers, in the order of the store's embeddings

    @property
    def records(self) -> list[ModelRecord]:
        """Those of the exits and of the whole model, which is the last of them."""
        return [*(record for record in self.exits.values() if record != self.record), self.record]


def revisions_of(name: str) -> list[str]:
    """Return all checkpoints of a run, oldest first, or all branches and tags of a Hub repository."""
    if Path(name).is_dir():
        return revisions_in(Path(name))
    with user_error(f"{name}: its revisions cannot be listed", "name them"):
        refs = HfApi().list_repo_refs(name)
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def load_model(
    name: str,
    revision: str | None,
    max_length: int,
    prompts: str = "auto",
    trust_remote_code: bool = False,
    devices: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    rank: int | None = None,
) -> EvaluatedModel:
    """Load a model (folder, run or Hub name), as mteb's registry describes it if the model is in the registry.

    ``prompts`` are ``published``: F2LLM-v2's for mteb's tasks; ``model``: those saved with the model; or ``auto``: the
    registry's, or the published ones for a model trained with such instructions, or else the model's own. ``layers``
    are the exits that are evaluated beside the whole model; an empty list stands for those that were trained. ``rank``
    is that of factorised token embeddings.
    """
    known = None if Path(name).is_dir() else MODEL_REGISTRY.get(name)
    options = registered_options(known) if known is not None else {}
    found = resolve(name, "MODEL", revision or (known and known.revision))
    encoder = SharedEncoder(partial(_load, found, trust_remote_code, options, max_length, layers, rank), devices)
    model = encoder.model
    used = _prompts(prompts, options, model)
    # Options that change the embeddings are part of the label and of the key in mteb's cache.
    experiment = {"prompts": prompts} if prompts != "auto" else {}
    experiment |= {"max_length": max_length} if max_length != DEFAULT_MAX_LENGTH else {}
    experiment |= {"pooling": "lasttoken"} if reads_as_ours(found.place, found.revision) else {}
    experiment |= {"rank": rank} if rank else {}
    unused, width = unused_parameters(model), int(model.get_embedding_dimension())
    parameters = sum(each.numel() for each in model.parameters()) - unused
    options_text = ", ".join(f"{key} {value}" for key, value in experiment.items())
    record = ModelRecord(name, revision, parameters, width, identity=found.identity, options=options_text)
    # A static model names no limit.
    length = min(max_length, model.max_seq_length)
    facts = (model.dtype, pooling_of(model), length, used.template or used.own)
    logger.info("%s: %s, pooled by %s, texts of at most %d tokens; prompts: %r", name, *facts)
    if known is None:
        public = "/".join(Path(found.place).resolve().parts[-2:]) if found.revision is None else found.place
        fields = {"name": public, "n_parameters": parameters, "embed_dim": width, "max_tokens": length}
        known = ModelMeta.create_empty({**fields, "framework": ["Sentence Transformers", "PyTorch"]})
    # A folder that was trained on, or a branch that moved, is another model.
    update = {"revision": found.identity} | ({"experiment_kwargs": experiment} if experiment else {})
    sizes = {layers: size - unused for layers, size in exit_sizes(model).items()}
    exits = {layers: record if size == parameters else record.of_exit(layers, size) for layers, size in sizes.items()}
    return EvaluatedModel(record, EmbeddingStore(encoder), known.model_copy(update=update), used, exits)


def registered_options(known: ModelMeta) -> dict[str, Any]:
    """Return the options of a model in mteb's registry; refuse models that only mteb evaluates as intended."""
    loader = getattr(known.loader, "__qualname__", str(known.loader))
    options = {**_LOADERS.get(loader, {}), **(known.loader_kwargs or {})}
    unknown = [repr(name) for name in options if name not in _SUPPORTED]
    if loader not in _LOADERS or unknown:
        what = " ".join([loader, *unknown])
        raise UserError(f"{known.name}: mteb's {what} is not supported here; use mteb run -m {known.name} -t TASK")
    return options


def _load(
    found: ModelRef,
    trust_remote_code: bool,
    options: dict[str, Any],
    max_length: int,
    layers: Sequence[int] | None = None,
    rank: int | None = None,
) -> SentenceTransformer:
    model_options = dict(options.get("model_kwargs") or {})
    # Whether its code runs is the user's choice.
    model_options.pop("trust_remote_code", None)
    if (dtype := model_options.pop("torch_dtype", model_options.get("dtype"))) is not None:
        model_options["dtype"] = getattr(dtype, "value", dtype)
    if rank is not None:
        model_options["embedding_rank"] = rank
    model = load_encoder(
        found,
        "MODEL",
        trust_remote_code=trust_remote_code,
        trust=TRUST_OPTION,
        device=options.get("device"),
        truncate_dim=options.get("embed_dim"),
        model_kwargs=model_options,
        processor_kwargs=options.get("tokenizer_kwargs") or options.get("processor_kwargs"),
        config_kwargs=options.get("config_kwargs"),
    )
    if options.get("add_eos_token"):
        append_eos(model.tokenizer)
    if "padding_side" in options:
        model.tokenizer.padding_side = options["padding_side"]
    if rank is not None and not has_factors(model):
        raise UserError(f"--ranks: the token embeddings of {found.name} have no factors of rank {rank}; leave it out")
    if not options.get("include_prompt", True):
        model.set_pooling_include_prompt(include_prompt=False)
    limit_length(model, min(max_length, options.get("max_seq_length") or model.max_seq_length or max_length))
    if layers is None or not (exits := layers or trained_exits(model)):
        return model
    depth = getattr(getattr(model[0], "config", None), "num_hidden_layers", 0)
    return with_exits(model, sorted({*exits, depth}), "--layers")


def _prompts(which: str, options: dict[str, Any], model: SentenceTransformer) -> Prompts:
    if which == "auto" and options.get("instruction_template") is not None:
        return Prompts(
            by_task=options.get("prompts_dict"),
            template=options["instruction_template"],
            on_documents=options.get("apply_instruction_to_passages", True),
        )
    if which == "auto" and options.get("model_prompts"):
        return Prompts(own=dict(options["model_prompts"]))
    own = {name: text or "" for name, text in model.prompts.items()}
    # The whole template before queries, none before documents. Qwen3-Embedding's only lacks the last space.
    pattern = ".*".join(map(re.escape, TEMPLATE.split("{instruction}")))
    instructed = not own.get("document") and re.fullmatch(pattern, own.get("query", ""), re.DOTALL)
    # F2LLM puts its instruction before texts of symmetric tasks, too.
    default = own.get("query" if instructed else model.default_prompt_name, "")
    if which == "published" or (which == "auto" and instructed):
        published = MODEL_REGISTRY[_PUBLISHED].loader_kwargs
        by_task, template = published["prompts_dict"], published["instruction_template"]
        return Prompts({"document": "", **own}, by_task, template, default=default)
    return Prompts({"document": "", **own} if instructed else own, default=default)


class EncoderView(AbsEncoder):
    """An mteb encoder over the leading dimensions of a store's embeddings in one precision.

    Beside int8 documents, queries stay in float32, as in FAISS. int8 is calibrated on each corpus of retrieval, and
    otherwise on the first texts of a task, so that training and test texts share a scale. mteb's own search would read
    and format the corpus again for each view and subset.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        dimension: int | None = None,
        precision: str = "float32",
        layers: int | None = None,
    ) -> None:
        record = model.record if layers is None else model.exits[layers]
        self.store, self.prompts, meta = model.store, model.prompts, model.meta
        width = self.store.width
        self.dimension, self.precision = width if dimension is None else dimension, precision
        if not 1 <= self.dimension <= width:
            raise UserError(f"dimension {dimension}: {record.label} has {width}; choose from 1 to {width}")
        self.label, self._start = record.label, 0 if layers is None else list(model.exits).index(layers) * width
        # Read by mteb's methods.
        self.model, self.model_prompts = self.store.model, self.prompts.own
        self.prompts_dict, self.instruction_template = self.prompts.by_task, self.prompts.template
        self._ranges: dict[str, Floats] = {}
        self._similarity = meta.similarity_fn_name or self.store.model.similarity_fn_name
        # mteb's cache keeps results by these: views must not share one.
        experiment = {**(meta.experiment_kwargs or {}), "dimension": self.dimension, "precision": precision}
        if precision == "int8":
            experiment["quantizer"] = "QT_8bit"
        if record is not model.record:
            experiment["layers"] = layers
        full = self.dimension == width and precision == "float32" and record is model.record
        self.mteb_model_meta = meta if full else meta.model_copy(update={"experiment_kwargs": experiment})

    def prompt(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """Return the instruction for the task or its type, or else the model's prompt."""
        used = self.prompts
        # Local tasks get the model's own instruction: they are what it was trained for.
        instructed = not used.own or (
            get_prompt_name(used.by_task, task_metadata, prompt_type) and _is_of_mteb(task_metadata.name)
        )
        if used.template is not None and instructed:
            if prompt_type == PromptType.document and not used.on_documents:
                return ""
            return self.get_task_instruction(task_metadata, prompt_type)
        own = get_prompt(used.own, task_metadata, prompt_type)
        return used.default if own is None else own

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: PromptType | None = None, **kwargs: Any
    ) -> Floats:
        """Return ``(n, dimension)`` embeddings of mteb's batches of texts."""
        return self.embed([text for batch in inputs for text in batch["text"]], task_metadata, prompt_type)

    def embed(self, texts: Sequence[str], task_metadata: Any, prompt_type: PromptType | None) -> Floats:
        """Return ``(n, dimension)`` embeddings of a task's texts."""
        prompt = self.prompt(task_metadata, prompt_type)
        found = self.store.encode(texts, prompt, prompt_type and prompt_type.value)
        found = found[:, self._start : self._start + self.dimension]
        if self.precision == "int8" and self._similarity == "cosine":
            found = unit_length(found)
        if self.precision == "float32" or (self.precision == "int8" and prompt_type == PromptType.query):
            return found
        if task_metadata.name not in self._ranges:
            self._ranges[task_metadata.name] = calibrate(found)
        return quantized(found, self.precision, self._ranges[task_metadata.name])

    def index(self, corpus: Any, *, task_metadata: Any, **kwargs: Any) -> None:
        """Set the documents that are searched; in int8 they get a scale of their own."""
        self._ids, self._documents = self._read(corpus, task_metadata, PromptType.document)
        self._ranges.pop(task_metadata.name, None)

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """Return the similarities of the ``top_k`` documents of each query, or of those in ``top_ranked``."""
        names, texts = self._read(queries, task_metadata, PromptType.query)
        documents = torch.from_numpy(self.embed(self._documents, task_metadata, PromptType.document))
        embeddings = torch.from_numpy(self.embed(texts, task_metadata, PromptType.query))
        results = {}
        if top_ranked is not None:
            row_of = {name: row for row, name in enumerate(self._ids)}
            for name, query in zip(names, embeddings, strict=True):
                given = list(top_ranked.get(name, ()))
                found = self.similarity(query[None], documents[[row_of[each] for each in given]])
                results[name] = dict(zip(given, torch.as_tensor(found)[0].tolist(), strict=True))
            return results
        at_once = max(1, _SIMILARITIES // len(documents))
        for start in range(0, len(names), at_once):
            similarities = torch.as_tensor(self.similarity(embeddings[start : start + at_once], documents)).float()
            best = similarities.topk(min(top_k, len(documents)), dim=1)
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for name, (rows, values) in zip(names[start : start + at_once], found, strict=True):
                results[name] = {self._ids[row]: value for row, value in zip(rows, values, strict=True)}
        return results

    def _read(self, dataset: Any, task_metadata: Any, prompt_type: PromptType) -> tuple[list[str], list[str]]:
        """Return ids and texts of a corpus or queries; they are read once for all views and subsets."""
        key = (prompt_type, id(dataset))
        if key not in self.store.read:
            loader = create_dataloader(dataset, task_metadata=task_metadata, prompt_type=prompt_type, batch_size=512)
            texts = [text for batch in loader for text in batch["text"]]
            # While the dataset is held, no other one gets its id.
            self.store.read[key] = (list(dataset["id"]), texts, dataset)
        return self.store.read[key][:2]


def views_of(
    model: EvaluatedModel, dims: Sequence[int] = (), precisions: Sequence[str] = ("float32",)
) -> list[EncoderView]:
    """Return a view of each exit (without exits: of the whole model), precision and width (default: the full one)."""
    combined = product(model.exits or [None], dict.fromkeys(precisions), dict.fromkeys(dims or [model.store.width]))
    return [EncoderView(model, dim, precision, layers) for layers, precision, dim in combined]


@cache
def _is_of_mteb(task: str) -> bool:
    try:
        mteb.get_task(task)
    except KeyError:
        return False
    return True
