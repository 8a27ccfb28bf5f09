"""An adapter that is released by itself: its own small files, and the name of the base that it needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from training.common.errors import UserError, in_one_line
from training.models.adapter import ADAPTER_WEIGHTS
from training.models.adapter_folder import find_adapter
from training.models.adapter_merging import trained_widths
from training.models.adapter_shapes import expected_shapes
from training.publishing.adapter_base import BaseModel, FoundBase, find_base
from training.publishing.model_files import copy_sentence_files, family_of, read_sentence_files, shape_of
from training.publishing.record import AdapterRecord
from training.publishing.states import ModelState, read_json
from training.publishing.weights import finite, weights_digest

logger = logging.getLogger("training")

ADAPTER_CONFIG = "adapter_config.json"
_ARGUMENTS = "training_arguments.json"
_DTYPES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}


@dataclass(frozen=True)
class AdapterModel:
    """An adapter's folder, and its base as far as it is at hand.

    Attributes:
        folder: The folder.
        config: Its ``adapter_config.json``.
        base: Its base.
        shapes: By name of a weight, its shape.
        dtype: Of its weights.
        sentences: Its ``config_sentence_transformers.json``.
        modules: Folders of its sentence-transformers modules.
        width: Of its embeddings.
        length: Tokens of a text at most, as its tokenizer has it.
    """

    folder: Path
    config: Mapping[str, Any]
    base: FoundBase
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str
    sentences: Mapping[str, Any]
    modules: tuple[str, ...]
    width: int
    length: int

    @property
    def known_base(self) -> BaseModel | None:
        """The base, as it is on the Hub or as it was trained on."""
        return self.base.model or self.base.trained_on

    @property
    def fields(self) -> dict[str, Any]:
        """What a release says of the model, by the names of its record."""
        known = self.known_base
        length = min(self.length, known.config.max_position_embeddings) if known else self.length
        widths = trained_widths(read_json(self.folder / _ARGUMENTS), self.width)
        if widths is None and known is not None:
            widths = known.config.matryoshka_dimensions
        versions = dict(self.sentences.get("__version__") or {})
        return {
            "parameters": sum(map(prod, self.shapes.values())),
            "dimension": self.width,
            "dimensions": (self.width, *(each for each in widths or () if each != self.width)),
            "max_length": length,
            "shape": shape_of(known.config) if known else {},
            "prompts": dict(self.sentences.get("prompts") or {}),
            "versions": {**versions, "peft": self.config.get("peft_version") or "unknown"},
            "family": family_of(known.config) if known else None,
            "adapter": self.record,
        }

    @property
    def record(self) -> AdapterRecord:
        """What a release says of the adapter."""
        return AdapterRecord(
            base=self.base.reference,
            match=self.base.match,
            **adapter_fields(self.config),
            parameters=sum(map(prod, self.shapes.values())),
            base_weights=None if self.base.model is None else weights_digest(self.base.model.folder),
            base_code=self.known_base is not None and bool(self.known_base.code),
        )

    def copy_files(self, folder: Path, dtype: str) -> None:
        """Copies all but the weights; the base goes by its name on the Hub, and brings the code."""
        told = {**self.config, "base_model_name_or_path": self.base.reference.name, "inference_mode": True}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_sentence_files(self.folder, self.modules, folder)

    def copy_weights(self, folder: Path, dtype: str, max_shard_size: str) -> None:
        """Copies the weights in a dtype, as the one file that every reader of adapters looks for.

        Raises:
            UserError: If a weight is not finite, or would not be.
        """
        target, tensors = getattr(torch, dtype), {}
        with safe_open(self.folder / ADAPTER_WEIGHTS, framework="pt") as stored:
            for name in sorted(self.shapes):
                tensors[name] = finite(self.folder, name, stored.get_tensor(name).to(target).contiguous())
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapter(state: ModelState, base: str | None = None) -> AdapterModel:
    """Looks at a run's adapter.

    Args:
        state: The run's state, which is an adapter.
        base: Name of its base on the Hub; that which it says itself if None.

    Raises:
        UserError: If a file is missing or damaged, the base has no name on the Hub or other weights, or the adapter
            does not fit it.
    """
    folder = state.folder
    adapter = find_adapter(str(folder))
    shapes, dtype = _weights(folder)
    sentences, modules = read_sentence_files(folder)
    try:
        length = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).model_max_length
        pooling = read_json(folder / "1_Pooling/config.json")
        width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
    except UserError:
        raise
    # Damaged files come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({in_one_line(error)}); pack another state of the run") from None
    config = read_json(folder / ADAPTER_CONFIG)
    model = AdapterModel(
        folder, config, find_base(adapter, base), shapes, dtype, sentences, modules, width, int(length)
    )
    if model.known_base is not None:
        _check_fit(model, model.known_base)
    else:
        logger.warning("%s: its base is not at hand, so that nothing is checked against it", folder)
    return model


def _weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], str]:
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as stored:
            pieces = {name: stored.get_slice(name) for name in stored.keys()}
            shapes = {name: tuple(piece.get_shape()) for name, piece in pieces.items()}
            dtypes = {piece.get_dtype() for piece in pieces.values()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({in_one_line(error)}); pack another state of the run") from None
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
        raise UserError(f"{path}: has weights of {', '.join(sorted(dtypes)) or 'no dtype'}; pack another state")
    return shapes, _DTYPES[dtypes.pop()]


def _check_fit(model: AdapterModel, base: BaseModel) -> None:
    """The weights are those of such an adapter of the base, no more and no fewer."""
    if base.config.hidden_size != model.width:
        raise UserError(
            f"{model.folder}: embeddings of {model.width} dimensions, but {base.folder} is {base.config.hidden_size} "
            "wide; give the adapter's own base"
        )
    expected = expected_shapes(model.folder, base.config)
    for name in sorted({*model.shapes, *expected}):
        has, wants = (each.get(name, "absent") for each in (model.shapes, expected))
        if has != wants:
            raise UserError(f"{model.folder}: weight {name} is {has}, its base wants {wants}; give the adapter's own")


def adapter_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of an adapter's shape, from its ``adapter_config.json``."""
    targets = config.get("target_modules") or ()
    return {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        "dora": bool(config.get("use_dora")),
        "rslora": bool(config.get("use_rslora")),
    }


def adapter_parameters(folder: Path) -> int:
    """Number of an adapter's parameters.

    Raises:
        UserError: If its weights are damaged.
    """
    return sum(map(prod, _weights(folder)[0].values()))
