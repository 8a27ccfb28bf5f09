"""Loading weights, all of them or none."""

from __future__ import annotations

from typing import Any

import torch

from modeling_f2llm.modeling_f2llm import F2LLMModel
from training.common.errors import UserError, in_one_line
from training.models.adapter import attach_adapter
from training.models.adapter_folder import AdapterFolder, base_revision, find_adapter
from training.models.checks import check_finite


def load_whole_model(name: str, revision: str | None = None, train_adapter: bool = False, **options: Any) -> F2LLMModel:
    """Loads a model in fp32: AdamW at usual learning rates is lost on bf16 weights.

    Args:
        name: Folder or Hub name of a model, or of an adapter, which is loaded with its base.
        revision: Branch, tag or commit on the Hub.
        train_adapter: Whether the adapter is to be trained; its base never is.
        **options: Those of ``F2LLMModel.from_pretrained``.

    Raises:
        UserError: If an adapter and its base do not belong together.
        ValueError: If weights are missing, which the library would fill with random ones, or one is not finite.
        Exception: Whatever the libraries make of a damaged folder.
    """
    adapter = find_adapter(name, revision)
    if adapter is None:
        return _load(name, revision=revision, **options)
    model = load_base(adapter, **options)
    attach_adapter(model, adapter, train_adapter)
    check_finite(model)
    return model


def load_base(adapter: AdapterFolder, place: str | None = None, same: bool = True, **options: Any) -> F2LLMModel:
    """Loads the model that an adapter was trained on.

    Args:
        adapter: The adapter.
        place: Where its base is now; where the adapter says if None.
        same: Whether the weights must be those that the adapter was trained on, if it says which.
        **options: Those of ``F2LLMModel.from_pretrained``.

    Raises:
        UserError: If it is not there, or is no longer what it was.
    """
    trained_on = f"{adapter.name} was trained on {adapter.base}"
    place = place or adapter.base
    try:
        model = _load(place, **options)
    # Damaged folders come out of the libraries as anything.
    except Exception as error:
        raise UserError(
            f"{trained_on}; {place} cannot be loaded ({in_one_line(error)}); put its base there, or say where it is as "
            "'base_model_name_or_path' in adapter_config.json"
        ) from None
    if same and adapter.base_revision not in (None, base_revision(place, "the base")):
        raise UserError(f"{trained_on}, but {place} has other weights than that had; give the adapter its own base")
    return model


def _load(name: str, **options: Any) -> F2LLMModel:
    model, loaded = F2LLMModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    if loaded["missing_keys"]:
        raise ValueError(
            f"its weights lack {sorted(loaded['missing_keys'])[0]} and others; fetch or save the model again"
        )
    check_finite(model)
    return model
