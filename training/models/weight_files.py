"""The weights in a model's folder, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.common.errors import UserError, in_one_line

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# File that says that a folder holds an adapter.
ADAPTER = "adapter_config.json"
# As safetensors calls them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorInfo(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles:
    """The safetensors of a model's folder: one file, or shards with an index.

    Args:
        folder: Folder of the model.

    Attributes:
        file_of: The file of every tensor by name.
        tensors: Shape and dtype of every tensor by name, in alphabetical order.

    Raises:
        UserError: If there are no safetensors, or one is damaged or lacks a tensor that the index promises; also if a
            tensor holds no floating-point numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: Mapping[str, Path] = _files(folder)
        found: dict[str, TensorInfo] = {}
        for path in self.paths:
            found |= _read_header(path)
        if missing := sorted(set(self.file_of) - set(found)):
            raise UserError(f"{folder}: its weights lack {missing[0]}, which the index promises; fetch the model again")
        self.tensors: Mapping[str, TensorInfo] = {name: found[name] for name in sorted(self.file_of)}

    @property
    def paths(self) -> list[Path]:
        """The files, in alphabetical order."""
        return sorted(set(self.file_of.values()))

    def read(self, name: str) -> Tensor:
        """Reads a tensor from its file; nothing else of the file stays in memory."""
        # An open file keeps all that was read from it mapped, so each tensor opens its file anew.
        with safe_open(self.file_of[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def digest(self) -> str:
        """Changes with any of the weights, but not with the place they lie in."""
        digest = blake2b(digest_size=16)
        for path in self.paths:
            with path.open("rb") as handle:
                while block := handle.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor by name."""
    if (folder / _INDEX).is_file():
        try:
            places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in places.items()}
        # JSON of any other form: a list, a map to numbers.
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            raise UserError(f"{folder / _INDEX}: damaged ({reason}); fetch the model again") from None
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(_read_header(folder / _SINGLE), folder / _SINGLE)
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder}: an adapter without a model's weights; merge it into its base first (merge_adapter.py)"
        )
    if list(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder}: its weights are pickled, not safetensors; load it with transformers and save it again"
        )
    raise UserError(f"{folder}: the folder holds no weights as safetensors; it lacks {_SINGLE}")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(path, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}
            kinds = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({in_one_line(error)}); fetch it again") from None
    for name, (_, dtype) in kinds.items():
        if dtype not in _DTYPES:
            raise UserError(f"{path}: {name} holds {dtype}; only floating-point weights can be used")
    return {name: TensorInfo(shape, _DTYPES[dtype]) for name, (shape, dtype) in kinds.items()}
