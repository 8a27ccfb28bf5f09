"""Loading a model to be evaluated, with what mteb's registry knows of it: revision, precision, prompts, EOS token."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY
from sentence_transformers import SentenceTransformer

from modeling_f2llm.prompts import TEMPLATE
from modeling_f2llm.tokenizer import append_eos
from training.errors import UserError, in_one_line
from training.evaluation.places import find_model
from training.evaluation.records import ModelRecord
from training.evaluation.store import EmbeddingStore
from training.model_identity import model_revision

__all__ = ["DEFAULT_MAX_LENGTH", "EvaluatedModel", "Prompts", "load_model"]

logger = logging.getLogger("training")

DEFAULT_MAX_LENGTH = 8192  # that of the published evaluation
# Whose prompts for mteb's tasks are meant by the published ones: all sizes have the same.
_PUBLISHED = "codefuse-ai/F2LLM-v2-80M"
# Options of mteb's registry that are heeded.
_HANDLED = {
    *("model_kwargs", "tokenizer_kwargs", "config_kwargs", "padding_side", "add_eos_token", "max_seq_length"),
    *("trust_remote_code", "model_prompts", "prompts_dict", "instruction_template", "apply_instruction_to_passages"),
}


@dataclass(frozen=True)
class Prompts:
    """What is put before the texts of a task.

    Attributes:
        own: By mteb's names of prompts (task, type of task, ``query``, ``document``), whole prompts.
        by_task: By the same names, instructions.
        template: Holds ``{instruction}``; a function of instruction and type of prompt in some entries of the registry.
        on_documents: Whether documents get the template, too.
        default: Prompt where no other fits.
    """

    own: dict[str, str] = field(default_factory=dict)
    by_task: dict[str, Any] | None = None
    template: Any = None
    on_documents: bool = False
    default: str = ""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is ready to be evaluated.

    Attributes:
        record: What is noted of it.
        store: Encodes with it.
        meta: mteb's entry; its name, revision and experiment are where mteb keeps results.
        prompts: What it expects before texts.
    """

    record: ModelRecord
    store: EmbeddingStore
    meta: ModelMeta
    prompts: Prompts


def load_model(
    name: str, revision: str | None, max_length: int, prompts: str = "auto", trust_remote_code: bool = False
) -> EvaluatedModel:
    """Loads a model as mteb's registry says, where it knows the model.

    Args:
        name: Folder or Hub name.
        revision: Commit, branch, tag, or checkpoint of a run.
        max_length: Tokens of a text at most.
        prompts: ``published``: the published prompts of F2LLM-v2 for mteb's tasks; ``model``: those that the model was
            saved with; ``auto``: the registry's, or the published ones for a model that was trained with such
            instructions, or else the model's own.
        trust_remote_code: Run code that a repository on the Hub brings along.

    Raises:
        UserError: If there is no such model, or it cannot be loaded.
    """
    place, at = find_model(name, revision)
    local = Path(place).is_dir()
    known = MODEL_REGISTRY.get(place)
    if known is not None and at is None:
        at = known.revision
    # What mteb keeps results by: a folder that was trained on, or a branch that moved, is another model.
    found = model_revision(place, "MODEL", at)
    options = dict(known.loader_kwargs or {}) if known is not None else {}
    model = _load(place, None if local else found, local or trust_remote_code, options)
    longest = options.get("max_seq_length") or model.max_seq_length or max_length
    model.max_seq_length = min(max_length, longest)
    used = _prompts(prompts, options, model)
    if not any(used.own.values()) and used.template is None:
        logger.warning("%s has no prompts: queries and documents are encoded as they are", name)
    experiment = {key: value for key, value in (("prompts", prompts),) if value != "auto"}
    # Embeddings of texts that are cut elsewhere are others, too.
    experiment |= {"max_length": max_length} if max_length != DEFAULT_MAX_LENGTH else {}
    meta = known or _meta(model, place, local)
    store = EmbeddingStore(model)
    record = ModelRecord(
        name,
        revision,
        sum(weights.numel() for weights in model.parameters()),
        store.width,
        identity=found,
        options=", ".join(f"{key} {value}" for key, value in experiment.items()),
    )
    update = {"revision": found} | ({"experiment_kwargs": experiment} if experiment else {})
    return EvaluatedModel(record, store, meta.model_copy(update=update), used)


def _load(place: str, revision: str | None, trust_remote_code: bool, options: dict[str, Any]) -> SentenceTransformer:
    if without_effect := sorted(set(options) - _HANDLED):
        logger.warning("%s: mteb's registry gives options that have no effect here: %s", place, without_effect)
    model_options = dict(options.get("model_kwargs") or {})
    if (dtype := model_options.pop("torch_dtype", None)) is not None:
        model_options["dtype"] = getattr(dtype, "value", dtype)
    try:
        model = SentenceTransformer(
            place,
            revision=revision,
            trust_remote_code=trust_remote_code,
            model_kwargs=model_options,
            processor_kwargs=options.get("tokenizer_kwargs"),
            config_kwargs=options.get("config_kwargs"),
        )
        if "padding_side" in options:
            model.tokenizer.padding_side = options["padding_side"]
        if options.get("add_eos_token"):
            append_eos(model.tokenizer)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{place}: cannot be loaded as a SentenceTransformer ({in_one_line(error)})") from None
    return model


def _meta(model: SentenceTransformer, place: str, local: bool) -> ModelMeta:
    """An entry for a model that mteb does not know."""
    return ModelMeta.create_empty(
        {
            "name": "/".join(Path(place).resolve().parts[-2:]) if local else place,
            "n_parameters": sum(weights.numel() for weights in model.parameters()),
            "embed_dim": model.get_embedding_dimension(),
            "max_tokens": model.max_seq_length,
            "framework": ["Sentence Transformers", "PyTorch"],
        }
    )


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
    instructed = own.get("query", "").startswith(TEMPLATE.partition("{")[0])
    # F2LLM puts its instruction before texts of symmetric tasks, too.
    default = own.get("query" if instructed else model.default_prompt_name, "")
    if which == "published" or (which == "auto" and instructed):
        published = MODEL_REGISTRY[_PUBLISHED].loader_kwargs
        return Prompts(
            {"document": "", **own}, published["prompts_dict"], published["instruction_template"], default=default
        )
    return Prompts({"document": "", **own} if instructed else own, default=default)
