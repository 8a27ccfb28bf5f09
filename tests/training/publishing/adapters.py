"""Adapters to be packed: a run over a saved base, and a base in the cache of the Hub's client."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.recipes import write_single_stage
from training.run_stage import main

__all__ = ["BASE", "COMMIT", "change_weights", "put_in_cache", "train_adapter"]

# Name and commit of the base on the Hub.
BASE, COMMIT = "org/tiny-base", "0123456789abcdef0123456789abcdef01234567"


def train_adapter(folder: Path, base: Path, **keys: Any) -> Path:
    """Trains an adapter of a base for a second; returns its run."""
    new_model = {"model_config": None, "tokenizer": None, "tokenizer_vocab_size": None}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_single_stage(folder, **{"model": str(base), "lora": True, "lora_rank": 4, **new_model, **keys})
    assert main([str(recipe)]) == 0
    return folder / "run"


def put_in_cache(folder: Path, name: str = BASE, commit: str = COMMIT) -> Path:
    """Copies a model to where the Hub's client keeps those that it fetched; returns the copy."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    return Path(shutil.copytree(folder, place / "snapshots" / commit))


def change_weights(path: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Changes the tensors of a file; what becomes None is dropped."""
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: each.contiguous() for name, each in changed.items() if each is not None}, path, {"format": "pt"})
