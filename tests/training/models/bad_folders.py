"""Ways in which a model's folder is broken, each of which some library ignores or reports with a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CHANGED = "layers.1.mlp.up_proj.weight"


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _with(value: float | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / _WEIGHTS)
        changed = weights.pop(_CHANGED)
        if value is not None:
            changed[0, 0] = value
            weights[_CHANGED] = changed
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})

    return damage


def _cut(folder: Path) -> None:
    content = (folder / _WEIGHTS).read_bytes()
    (folder / _WEIGHTS).write_bytes(content[: len(content) // 2])


def _pickled(folder: Path) -> None:
    (folder / _WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")


def _with_index(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / _WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / _INDEX).write_text(json.dumps(content))

    return damage


# By name: what breaks the folder, and a word of the message.
BAD_FOLDERS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "no tokenizer.json": (_without_tokenizer, "tokenizer"),
    "lacks a tensor": (_with(None), "layers.1.mlp.up_proj"),
    "NaN": (_with(torch.nan), "layers.1.mlp.up_proj"),
    "infinite": (_with(torch.inf), "layers.1.mlp.up_proj"),
    "cut": (_cut, ""),
    "pickled": (_pickled, ""),
    "index is a list": (_with_index([1, 2]), ""),
    "weight map is a list": (_with_index({"metadata": {}, "weight_map": ["a"]}), ""),
}
