"""Averages models tensor by tensor into shards: memory holds one shard, however large the models are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from training.common.errors import UserError
from training.models.merging.method import Method
from training.models.merging.parents import Parent

MAX_SHARD_SIZE = "5GB"


def common_dtype(parents: Sequence[Parent]) -> torch.dtype:
    """The dtype in which all models hold all weights.

    Raises:
        UserError: If there is none.
    """
    of_dtype = {info.dtype: parent.name for parent in parents for info in parent.weights.tensors.values()}
    if len(of_dtype) > 1:
        (one, first), (two, second), *_ = of_dtype.items()
        raise UserError(
            f"weights of {first} are {_name(one)}, of {second} {_name(two)}; say with --dtype what shall be written"
        )
    (dtype,) = of_dtype
    if dtype is torch.float64:
        raise UserError("the weights are float64, and averages are taken in float32; say with --dtype what to write")
    return dtype


def write_average(
    parents: Sequence[Parent], method: Method, dtype: torch.dtype, folder: Path, max_shard_size: str = MAX_SHARD_SIZE
) -> int:
    """Writes the average of models as safetensors.

    Args:
        parents: Models of the same tensors.
        method: How they are averaged, in fp32.
        dtype: What is written.
        folder: Gets ``model.safetensors``, or shards and their index.
        max_shard_size: Of a file at most, such as ``5GB``; a larger tensor is a shard of its own.

    Returns:
        Number of tensors.

    Raises:
        UserError: If a weight is not finite, an average does not exist, or ``max_shard_size`` is no size.
    """
    # Tensors without content: the rule by which transformers shards a model needs their sizes only.
    planned = {
        name: torch.empty(info.shape, dtype=dtype, device="meta") for name, info in parents[0].weights.tensors.items()
    }
    try:
        plan = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    except ValueError:
        raise UserError(f"--max-shard-size: {max_shard_size!r} is no size; write it as 5GB or 500MB") from None
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _average(parents, method, name, dtype) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        # The next shard is not made while this one is held.
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return len(planned)


def _average(parents: Sequence[Parent], method: Method, name: str, dtype: torch.dtype) -> Tensor:
    try:
        average = method.average(_read(parents, name)).to(dtype)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} of {' and '.join(parent.name for parent in parents)}: {error}; use the mean") from None
    if not average.isfinite().all():
        raise UserError(f"{name}: the average is too large for {_name(dtype)}; choose another --dtype")
    return average


def _read(parents: Sequence[Parent], name: str) -> Iterator[Tensor]:
    """A tensor of each model, one after the other."""
    for parent in parents:
        tensor = parent.weights.read(name)
        if not tensor.isfinite().all():
            raise UserError(f"{parent.name}: {name} holds NaN or infinite weights; leave the model out")
        yield tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
