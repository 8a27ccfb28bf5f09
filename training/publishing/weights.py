"""Weights of a released model: safetensors of one dtype in shards, written one after the other.

No more than one shard is in memory, so that a machine can pack models that it could not load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from training.models.adapters import ADAPTER_WEIGHTS
from training.models.model_folder import WeightFiles, is_finite, user_error, wrong_weight
from training.models.model_ref import model_revision
from training.publishing.states import write_json

MAX_SHARD_SIZE = "5GB"
# Dtypes of released weights by name, and of the weights that a run may have saved.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SAVED_DTYPES = (*DTYPES, "float16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The weights in a folder, not loaded."""

    folder: Path
    files: Mapping[str, str]  # file of each weight by name
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str  # its name

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(map(prod, self.shapes.values()))

    def load(self, name: str) -> Tensor:
        """Load one weight."""
        # An open file keeps all that was read from it in memory.
        with safe_open(self.folder / self.files[name], framework="pt") as stored:
            return stored.get_tensor(name)

    def save(self, names: Iterable[str], path: Path, dtype: str) -> None:
        """Write some of the weights to a file, as ``dtype``; none may be NaN or infinite."""
        tensors = {}
        for name in names:
            tensors[name] = self.load(name).to(getattr(torch, dtype)).contiguous()
            if not is_finite(tensors[name]):
                raise UserError(
                    f"{self.folder}: weight {name} is NaN or infinite in {tensors[name].dtype}; pack an earlier "
                    "checkpoint"
                )
        # transformers requires this entry; other metadata of the run's files is left out.
        save_file(tensors, path, metadata={"format": "pt"})


def read_weights(folder: Path, config: F2LLMConfig) -> Weights:
    """Look at the weights of a model, which must be exactly those of ``config``."""
    stored = WeightFiles(folder)
    shapes = {name: info.shape for name, info in stored.tensors.items()}
    if (wrong := wrong_weight(shapes, config)) is not None:
        raise UserError(f"{folder}: {wrong}; pack another state")
    dtypes = {str(info.dtype).removeprefix("torch.") for info in stored.tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(SAVED_DTYPES):
        raise UserError(
            f"{folder}: weights of {', '.join(sorted(dtypes))}; only one of {', '.join(SAVED_DTYPES)} is packed"
        )
    return Weights(folder, {name: path.name for name, path in stored.file_of.items()}, shapes, dtypes.pop())


def copy_weights(weights: Weights, folder: Path, dtype: str, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write weights to a folder as ``dtype``: in one file, or in shards with an index if that would be too large."""
    if ADAPTER_WEIGHTS in weights.files.values():
        # Every reader of adapters looks for this one file.
        weights.save(sorted(weights.shapes), folder / ADAPTER_WEIGHTS, dtype)
        return
    itemsize = getattr(torch, dtype).itemsize
    with user_error(f"--max-shard-size {max_shard_size!r}", "give a size such as 5GB or 500MB"):
        split = split_state_dict_into_shards_factory(
            {name: prod(shape) * itemsize for name, shape in sorted(weights.shapes.items())},
            get_storage_size=int,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    for file, names in split.filename_to_tensors.items():
        weights.save(names, folder / file, dtype)
    if split.is_sharded:
        index = {"metadata": dict(split.metadata), "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        write_json(folder / INDEX, dict(sorted(index.items())))


def weights_digest(folder: Path) -> str:
    """Return the digest of a model's weight files, by which an adapter identifies its base."""
    return model_revision(str(folder), "the base", weights_only=True)
