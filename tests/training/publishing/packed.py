"""A packed folder of a tiny run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training.recipes import write_single_stage
from training.publishing.pack import PackOptions, pack
from training.run_stage import main

__all__ = ["NAME", "write_packed"]

NAME = "tiny-embedder"


def write_packed(folder: Path, **keys: Any) -> Path:
    """Trains for a second, with ``keys`` of a recipe, and packs the run without an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    assert main([str(write_single_stage(folder, instructions=True, **keys))]) == 0
    return pack(folder / "run", folder / "packed" / NAME, PackOptions(NAME))
