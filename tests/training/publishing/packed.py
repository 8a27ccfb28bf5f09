"""A packed folder of a tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.training.recipes import write_single_stage
from training.common.content import Content
from training.publishing.pack import PackOptions, pack
from training.publishing.record import RECORD
from training.run_stage import main

__all__ = ["NAME", "spoil", "write_packed"]

NAME = "tiny-embedder"


def write_packed(folder: Path, **keys: Any) -> Path:
    """Trains for a second, with ``keys`` of a recipe, and packs the run without an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    assert main([str(write_single_stage(folder, instructions=True, **keys))]) == 0
    return pack(folder / "run", folder / "packed" / NAME, PackOptions(NAME))


def spoil(folder: Path) -> None:
    """Gives a packed folder a fault that its record knows: the pooling of a wider model."""
    pooling = folder / "1_Pooling/config.json"
    pooling.write_text(pooling.read_text().replace("32", "64"))
    record = json.loads((folder / RECORD).read_text())
    record["sha256"]["1_Pooling/config.json"] = Content(pooling).sha256
    (folder / RECORD).write_text(json.dumps(record))
