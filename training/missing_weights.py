"""Weights that a checkpoint lacks and transformers fills with random ones, where embeddings depend on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel

__all__ = ["missing_weight"]


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
    """
    try:
        missing = dict(_missing(model, name, revision))
    # A folder without modules.json, an adapter, another backend: only what loads as transformers has it can be asked.
    except Exception:
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
    """Weights that the checkpoint lacks, by name."""
    folders = _module_folders(name, revision)
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
            yield f"{number}.{key}", inner.get_parameter(key)


def _module_folders(name: str, revision: str | None) -> dict[str, str]:
    """Where the modules of a SentenceTransformer lie, by their names; nothing for a plain model."""
    folder = Path(name)
    if folder.is_dir():
        path = folder / "modules.json"
        if not path.exists():
            return {}
    else:
        try:
            path = Path(hf_hub_download(name, "modules.json", revision=revision))
        except Exception:
            return {}
    return {module["name"]: module["path"] for module in json.loads(path.read_text(encoding="utf-8"))}
