"""Weights of a released model: safetensors of one dtype in shards, written one after the other.

No more than a shard is in memory, so that a machine packs models that it could not load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.models.checks import is_finite
from training.models.model_identity import model_revision
from training.models.shapes import wrong_weight
from training.models.weight_files import WeightFiles

MAX_SHARD_SIZE = "5GB"
# What weights may be released as, by name.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# What a run may have saved.
_SAVED = ("bfloat16", "float32", "float16")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The weights in a folder, as far as they are known without reading them.

    Attributes:
        folder: The folder.
        files: By name of a weight, the file that holds it.
        shapes: By name of a weight, its shape.
        dtype: The name of their dtype.
    """

    folder: Path
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(prod(shape) for shape in self.shapes.values())


def read_weights(folder: Path, config: F2LLMConfig) -> Weights:
    """Looks at the weights of a model's folder without loading them.

    Args:
        folder: The folder.
        config: The model's shape; the weights must be those of such a model, no more and no fewer.

    Raises:
        UserError: If there are none, a file is damaged, or they are not those of the shape.
    """
    stored = WeightFiles(folder)
    shapes = {name: info.shape for name, info in stored.tensors.items()}
    if (wrong := wrong_weight(shapes, config)) is not None:
        raise UserError(f"{folder}: {wrong}; pack another state")
    dtypes = {str(info.dtype).removeprefix("torch.") for info in stored.tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(_SAVED):
        raise UserError(f"{folder}: weights of {', '.join(sorted(dtypes))}; only one of {', '.join(_SAVED)} is packed")
    return Weights(folder, {name: path.name for name, path in stored.file_of.items()}, shapes, dtypes.pop())


def parse_size(written: str) -> int:
    """Bytes of a size such as ``5GB``.

    Raises:
        UserError: If it is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?B)", written.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"a file cannot have the size {written!r}; give one such as 5GB or 500MB")
    return int(float(match[1]) * 1000 ** "BKMGT".index(match[2][0]))


def copy_weights(weights: Weights, folder: Path, dtype: str, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Writes weights to another folder, as ``model.safetensors`` or as shards with their index.

    Args:
        weights: The weights.
        folder: Where they go.
        dtype: Name of the dtype that they get.
        max_shard_size: Of a shard at most, such as ``5GB``. A single weight may be larger.

    Raises:
        UserError: If a weight is not finite, or would not be in ``dtype``; or a file cannot be read any more.
    """
    target = getattr(torch, dtype)
    # As the shards hold them; the split looks at nothing else.
    sizes = {name: prod(shape) * target.itemsize for name, shape in sorted(weights.shapes.items())}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size),
    )
    for file, names in split.filename_to_tensors.items():
        # `pt` is what transformers looks for; nothing else of the run's files goes along.
        save_file(_read(weights, names, target), folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": dict(split.metadata), "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(weights: Weights, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    with ExitStack() as stack:
        stored = {
            file: stack.enter_context(safe_open(weights.folder / file, framework="pt"))
            for file in {weights.files[name] for name in names}
        }
        for name in names:
            tensor = stored[weights.files[name]].get_tensor(name).to(dtype).contiguous()
            tensors[name] = finite(weights.folder, name, tensor)
    return tensors


def finite(folder: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, if all of it is finite.

    Raises:
        UserError: If it is not.
    """
    if not is_finite(tensor):
        raise UserError(f"{folder}: weight {name} is NaN or infinite in {tensor.dtype}; pack an earlier checkpoint")
    return tensor


def weights_digest(folder: Path) -> str:
    """A digest of a folder's files of weights, as an adapter notes its base by it."""
    return model_revision(str(folder), "the base", weights_only=True)
