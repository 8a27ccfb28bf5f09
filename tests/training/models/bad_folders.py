"""Ways in which a model's folder is broken, each of which some library passes over or reports with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["BAD_FOLDERS"]

_WEIGHTS = "model.safetensors"
_CHANGED = "layers.1.mlp.up_proj.weight"


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _lacking_a_tensor(folder: Path) -> None:
    _rewrite(folder, lambda weights: weights.pop(_CHANGED))


def _with_nan(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[_CHANGED][0, 0] = float("nan")

    _rewrite(folder, spoil)


def _with_infinity(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[_CHANGED][0, 0] = float("inf")

    _rewrite(folder, spoil)


def _cut(folder: Path) -> None:
    content = (folder / _WEIGHTS).read_bytes()
    (folder / _WEIGHTS).write_bytes(content[: len(content) // 2])


def _pickled(folder: Path) -> None:
    (folder / _WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")


def _with_a_list_for_an_index(folder: Path) -> None:
    (folder / _WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / f"{_WEIGHTS}.index.json").write_text("[1, 2]")


def _with_a_list_for_a_weight_map(folder: Path) -> None:
    (folder / _WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / f"{_WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": ["a"]}))


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / _WEIGHTS)
    change(weights)
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


# By name: what breaks the folder, and a word of the message.
BAD_FOLDERS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "no tokenizer.json": (_without_tokenizer, "tokenizer"),
    "lacks a tensor": (_lacking_a_tensor, "layers.1.mlp.up_proj"),
    "NaN": (_with_nan, "layers.1.mlp.up_proj"),
    "infinite": (_with_infinity, "layers.1.mlp.up_proj"),
    "cut": (_cut, ""),
    "pickled": (_pickled, ""),
    "index is a list": (_with_a_list_for_an_index, ""),
    "weight map is a list": (_with_a_list_for_a_weight_map, ""),
}
