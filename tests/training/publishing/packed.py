"""Packed folders of tiny runs, adapters with their base, what folders hold, and copies that a test breaks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.training.recipes import write_single_stage
from training.common.hub import Content
from training.publishing.pack import PackOptions, pack
from training.publishing.record import RECORD
from training.publishing.verify import ADAPTER_CHECKS, CHECKS, Examination, examine
from training.run_stage import main

NAME = "tiny-embedder"
# Name and commit of an adapter's base on the Hub.
BASE, COMMIT = "org/tiny-base", "0123456789abcdef0123456789abcdef01234567"


def write_packed(folder: Path, **keys: Any) -> Path:
    """Train for a second, with ``keys`` of a recipe, and pack the run without an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    assert main([str(write_single_stage(folder, instructions=True, **keys))]) == 0
    return pack(folder / "run", folder / "packed" / NAME, PackOptions(NAME))


def spoil(folder: Path) -> None:
    """Give a packed folder a fault that its record knows: the pooling of a wider model."""
    pooling = folder / "1_Pooling/config.json"
    pooling.write_text(pooling.read_text().replace("32", "64"))
    record = json.loads((folder / RECORD).read_text())
    record["sha256"]["1_Pooling/config.json"] = Content(pooling).sha256
    (folder / RECORD).write_text(json.dumps(record))


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_adapter(folder: Path, base: Path, **keys: Any) -> Path:
    new_model = {"model_config": None, "tokenizer": None, "tokenizer_vocab_size": None}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_single_stage(folder, **{"model": str(base), "lora": True, "lora_rank": 4, **new_model, **keys})
    assert main([str(recipe)]) == 0
    return folder / "run"


def put_in_cache(folder: Path, name: str = BASE, commit: str = COMMIT) -> Path:
    """Copy a model to where the Hub's client keeps those that it downloaded; return the copy."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    return Path(shutil.copytree(folder, place / "snapshots" / commit))


def change_weights(path: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    """Change the tensors of a file; what becomes None is dropped."""
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: each.contiguous() for name, each in changed.items() if each is not None}, path, {"format": "pt"})


def rewrite_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite_recipe(run: Path, **keys: Any) -> None:
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def metadata_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


# The embeddings take a separate process and ten seconds: they have their own tests.
QUICK = {name: checks for name, checks in CHECKS.items() if name != "embeddings"}
QUICK_FOR_ADAPTERS = {name: checks for name, checks in ADAPTER_CHECKS.items() if name != "embeddings"}


class BrokenRelease:
    """A copy of a packed folder, whose files are links to the original; ``base`` is that of an adapter."""

    def __init__(self, release: Path, folder: Path) -> None:
        self.folder = folder
        self.base: Path | None = None
        self._checks = QUICK_FOR_ADAPTERS if (release / "adapter_config.json").is_file() else QUICK
        shutil.copytree(release, folder, copy_function=os.link)

    def write(self, name: str, content: str | bytes, listed: bool = True) -> None:
        """Replace a file or add one; with ``listed``, the record gives its size."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if listed and name != RECORD:
            self.list_sizes()

    def delete(self, name: str) -> None:
        (self.folder / name).unlink()
        self.list_sizes()

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def edit(self, name: str, change: Callable[[Any], Any] | None = None, **keys: Any) -> None:
        """Change a JSON file: by a function in place, or its keys, of which ``...`` deletes one."""
        content = self.read(name)
        if change is not None:
            change(content)
        if keys:
            content = {key: value for key, value in {**content, **keys}.items() if value is not ...}
        self.write(name, json.dumps(content))

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def edit_weights(self, change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> None:
        tensors = load_file(self.folder / file)
        change(tensors)
        (self.folder / file).unlink()
        save_file(tensors, self.folder / file, metadata={"format": "pt"})
        self.list_sizes()

    def list_sizes(self) -> None:
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.name != RECORD]
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}
        hashes = {name: Content(self.folder / name).sha256 for name in sizes}
        self.write(RECORD, json.dumps({**self.read(RECORD), "files": sizes, "sha256": hashes}))

    def examine(self) -> Examination:
        return examine(self.folder, self._checks, self.base)

    def faults(self) -> list[str]:
        return [str(fault) for fault in self.examine().faults]

    def expect(self, *expected: tuple[str, ...]) -> None:
        """Assert that the faults are these and no others: of each a file and parts of what is said."""
        faults = self.faults()
        assert len(faults) == len(expected), faults
        for fault, (file, *parts) in zip(sorted(faults), sorted(expected), strict=True):
            assert fault.startswith(f"{file}: ") and len(fault.splitlines()) == 1, fault
            for part in parts:
                assert part in fault
