"""Loading a model as mteb's registry describes it: revision, precision, prompts, EOS token."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from mteb.models import ModelMeta
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_implementations.qwen3_models import instruction_template as qwen3_template
from sentence_transformers import SentenceTransformer

from modeling_f2llm.prompts import TEMPLATE
from modeling_f2llm.tokenizer import append_eos
from training.common.errors import UserError
from training.evaluation.encoding import EmbeddingStore
from training.evaluation.records import DEFAULT_MAX_LENGTH, ModelRecord
from training.evaluation.views import Prompts
from training.models.encoders import TRUST_OPTION, load_encoder, pooling_of
from training.models.model_folder import user_error
from training.models.model_ref import ModelRef, reads_as_ours, resolve, revisions_in

logger = logging.getLogger("training")

# All sizes have the same prompts for mteb's tasks.
_PUBLISHED = "codefuse-ai/F2LLM-v2-80M"
# mteb's loaders that load a SentenceTransformer and add prompts, as is done here, and the options that they add.
_INSTRUCTS = {"InstructSentenceTransformerModel", "q3e_instruct_loader", "instruct_loader"}
_LOADERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("SentenceTransformerEncoderWrapper", "sentence_transformers_loader", *_INSTRUCTS)},
    "q3e_instruct_loader": {"instruction_template": qwen3_template, "apply_instruction_to_passages": False},
}
# Options of mteb's registry that are supported, and those that do not concern texts.
_SUPPORTED = {
    *("model_kwargs", "tokenizer_kwargs", "processor_kwargs", "config_kwargs", "device", "embed_dim", "include_prompt"),
    *("padding_side", "add_eos_token", "max_seq_length", "trust_remote_code"),
    *("model_prompts", "prompts_dict", "instruction_template", "apply_instruction_to_passages"),
    *("num_frames", "max_frames", "min_frames", "fps", "max_samples", "target_sampling_rate"),
}


@dataclass(frozen=True)
class EvaluatedModel:
    """A loaded model; mteb keeps results by name, revision and experiment of ``meta``."""

    record: ModelRecord
    store: EmbeddingStore
    meta: ModelMeta
    prompts: Prompts


def revisions_of(name: str) -> list[str]:
    """Return all checkpoints of a run, oldest first, or all branches and tags of a Hub repository."""
    if Path(name).is_dir():
        return revisions_in(Path(name))
    with user_error(f"{name}: its revisions cannot be listed", "name them"):
        refs = HfApi().list_repo_refs(name)
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def load_model(
    name: str, revision: str | None, max_length: int, prompts: str = "auto", trust_remote_code: bool = False
) -> EvaluatedModel:
    """Load a model (folder, run or Hub name), as mteb's registry describes it if the model is in the registry.

    ``prompts`` are ``published``: F2LLM-v2's for mteb's tasks; ``model``: those saved with the model; or ``auto``: the
    registry's, or the published ones for a model trained with such instructions, or else the model's own.
    """
    known = None if Path(name).is_dir() else MODEL_REGISTRY.get(name)
    options = registered_options(known) if known is not None else {}
    found = resolve(name, "MODEL", revision or (known and known.revision))
    model = _load(found, trust_remote_code, options)
    longest = options.get("max_seq_length") or model.max_seq_length or max_length
    model.max_seq_length = min(max_length, longest)
    if longest < max_length != DEFAULT_MAX_LENGTH:
        logger.warning("%s reads %d tokens of a text at most, not --max-length %d", name, longest, max_length)
    used = _prompts(prompts, options, model)
    # Options that change the embeddings are part of the label and of the key in mteb's cache.
    experiment = {"prompts": prompts} if prompts != "auto" else {}
    experiment |= {"max_length": max_length} if max_length != DEFAULT_MAX_LENGTH else {}
    experiment |= {"pooling": "lasttoken"} if reads_as_ours(found.place, found.revision) else {}
    parameters, width = sum(each.numel() for each in model.parameters()), int(model.get_embedding_dimension())
    options_text = ", ".join(f"{key} {value}" for key, value in experiment.items())
    record = ModelRecord(name, revision, parameters, width, identity=found.identity, options=options_text)
    logger.info(
        "%s: loaded %s; prompts: %s; %s; pooled by %s; texts of at most %d tokens",
        *(name, "as mteb's registry says" if known else "as it was saved", used.described),
        *(str(model.dtype).removeprefix("torch."), pooling_of(model), model.max_seq_length),
    )
    if known is None:
        public = "/".join(Path(found.place).resolve().parts[-2:]) if found.revision is None else found.place
        fields = {"name": public, "n_parameters": parameters, "embed_dim": width, "max_tokens": model.max_seq_length}
        known = ModelMeta.create_empty({**fields, "framework": ["Sentence Transformers", "PyTorch"]})
    # A folder that was trained on, or a branch that moved, is another model.
    update = {"revision": found.identity} | ({"experiment_kwargs": experiment} if experiment else {})
    return EvaluatedModel(record, EmbeddingStore(model), known.model_copy(update=update), used)


def registered_options(known: ModelMeta) -> dict[str, Any]:
    """Return the options of a model in mteb's registry; refuse models that only mteb evaluates as intended."""
    loader = getattr(known.loader, "__qualname__", str(known.loader))
    options = {**_LOADERS.get(loader, {}), **(known.loader_kwargs or {})}
    unknown = [] if loader in _LOADERS else [f"loader {loader}"]
    if unknown := [*unknown, *(f"option {name!r}" for name in sorted(set(options) - _SUPPORTED))]:
        raise UserError(
            f"{known.name}: mteb loads this model with the {unknown[0]}, which is not supported here; evaluate it with "
            f"mteb: mteb run -m {known.name} -t TASK"
        )
    if loader in _INSTRUCTS:
        # Without a template, mteb gives these the plain instruction.
        options.setdefault("instruction_template", "{instruction}")
    return options


def _load(found: ModelRef, trust_remote_code: bool, options: dict[str, Any]) -> SentenceTransformer:
    model_options = dict(options.get("model_kwargs") or {})
    # Whether its code runs is the user's choice.
    model_options.pop("trust_remote_code", None)
    if (dtype := model_options.pop("torch_dtype", model_options.get("dtype"))) is not None:
        model_options["dtype"] = getattr(dtype, "value", dtype)
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
        with user_error(f"MODEL: {found.name!r} cannot be used as mteb's registry says"):
            append_eos(model.tokenizer)
    if "padding_side" in options:
        model.tokenizer.padding_side = options["padding_side"]
    if not options.get("include_prompt", True):
        model.set_pooling_include_prompt(include_prompt=False)
    return model


def _prompts(which: str, options: dict[str, Any], model: SentenceTransformer) -> Prompts:
    if which == "auto" and options.get("instruction_template") is not None:
        return Prompts(
            by_task=options.get("prompts_dict"),
            template=options["instruction_template"],
            on_documents=options.get("apply_instruction_to_passages", True),
            described="mteb's for its tasks, in the template of its registry",
        )
    if which == "auto" and options.get("model_prompts"):
        return Prompts(own=dict(options["model_prompts"]), described="those of mteb's registry")
    own = {name: text or "" for name, text in model.prompts.items()}
    # The whole template before queries, none before documents. Qwen3-Embedding's only lacks the last space.
    start, end = TEMPLATE.split("{instruction}")
    template = re.escape(start) + ".*" + re.escape(end)
    instructed = not own.get("document") and bool(re.fullmatch(template, own.get("query", ""), re.DOTALL))
    # F2LLM puts its instruction before texts of symmetric tasks, too.
    default = own.get("query" if instructed else model.default_prompt_name, "")
    if which == "published" or (which == "auto" and instructed):
        published = MODEL_REGISTRY[_PUBLISHED].loader_kwargs
        by_task, template = published["prompts_dict"], published["instruction_template"]
        described = "F2LLM-v2's for mteb's tasks, its own for others"
        return Prompts({"document": "", **own}, by_task, template, default=default, described=described)
    kept = {"document": "", **own} if instructed else own
    return Prompts(kept, default=default, described="its own" if any(own.values()) else "none")
