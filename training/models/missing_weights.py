"""Weights that a checkpoint lacks and transformers fills with random ones, where embeddings depend on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel

from training.models.adapter import ADAPTER_NAME, ADAPTER_WEIGHTS, has_adapter, lacking_weight
from training.models.adapter_folder import find_adapter
from training.models.model_identity import model_file

logger = logging.getLogger("training")


def missing_weight(model: SentenceTransformer, name: str, revision: str | None) -> str | None:
    """Finds a weight that is random although the embeddings depend on it.

    Weights may well be missing where nothing asks for them: a BERT without the pooler that mean pooling leaves aside.
    Those that matter receive a gradient from the embedding of a text.

    Args:
        model: The model as it was loaded, with all its weights frozen.
        name: The folder or Hub name that it was loaded from.
        revision: The commit on the Hub; None for a folder.

    Returns:
        Name of the weight; None if all that matter were loaded, or if the checkpoint is not one of transformers' own.
        Of an adapter all weights matter: those that it lacks are random or without effect.
    """
    lacking = _lacking_in_adapter(model, name, revision)
    if lacking is not None:
        return lacking
    try:
        missing = dict(_missing(model, name, revision))
    # A backend or code of another kind: only what loads as transformers has it can be asked.
    except Exception as error:
        logger.debug("%s: whether it lacks weights is not known (%s)", name, error)
        return None
    if not missing:
        return None
    for weight in missing.values():
        weight.requires_grad_()
    features = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for key, value in model.preprocess(["a text"]).items()
    }
    embedding = model(features)["sentence_embedding"].sum()
    used = [None] * len(missing)
    if embedding.requires_grad:
        used = torch.autograd.grad(embedding, list(missing.values()), allow_unused=True)
    for weight in missing.values():
        weight.requires_grad_(False)
    return next((key for key, gradient in zip(missing, used, strict=True) if gradient is not None), None)


def _missing(model: SentenceTransformer, name: str, revision: str | None) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights that the checkpoint, or that of an adapter's base, lacks, by name."""
    adapter = find_adapter(name, revision)
    if adapter is not None:
        name, revision = adapter.base, None
    folders = {} if adapter is not None else _module_folders(name, revision)
    for number, (child, module) in enumerate(model.named_children()):
        inner = getattr(module, "auto_model", None)
        if not isinstance(inner, PreTrainedModel):
            continue
        # Names alone: on the meta device nothing is read.
        _, loaded = type(inner).from_pretrained(
            name,
            subfolder=folders.get(child, "") if folders else "",
            revision=revision or "main",
            device_map="meta",
            output_loading_info=True,
        )
        for key in sorted(loaded["missing_keys"]):
            yield f"{number}.{key}", _parameter(inner, key)


def _parameter(model: PreTrainedModel, key: str) -> nn.Parameter:
    """A weight by its name in the checkpoint, which an adapter's layers have moved."""
    module, _, last = key.rpartition(".")
    moved = f"{module}.base_layer.{last}"
    return model.get_parameter(moved if moved in dict(model.named_parameters()) else key)


def _lacking_in_adapter(model: SentenceTransformer, name: str, revision: str | None) -> str | None:
    """A weight that the file of an adapter lacks; None if it is whole, or this is none."""
    inner = getattr(model[0], "auto_model", None)
    if not has_adapter(inner) or ADAPTER_NAME not in inner.peft_config:
        return None
    path = model_file(name, ADAPTER_WEIGHTS, revision)
    return None if path is None else lacking_weight(inner, path)


def _module_folders(name: str, revision: str | None) -> dict[str, str]:
    """Where the modules of a SentenceTransformer lie, by their names; nothing for a plain model."""
    path = model_file(name, "modules.json", revision)
    if path is None:
        return {}
    return {module["name"]: module["path"] for module in json.loads(path.read_text(encoding="utf-8"))}
