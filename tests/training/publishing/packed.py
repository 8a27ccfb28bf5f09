"""Packed folders of tiny runs, adapters with their base, what folders hold, and copies that a test breaks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file

from tests.training.recipes import NO_NEW_MODEL, write_single_stage
from training.common.hub import Content
from training.publishing.pack import PackOptions, pack
from training.publishing.record import RECORD
from training.publishing.verify import ADAPTER_CHECKS, CHECKS, examine
from training.run_stage import main

NAME = "tiny-embedder"
# Name and commit of an adapter's base on the Hub.
BASE, COMMIT = "org/tiny-base", "0123456789abcdef0123456789abcdef01234567"


def write_packed(folder, **keys):
    """Train for a second, with ``keys`` of a recipe, and pack the run without an evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    assert main([str(write_single_stage(folder, instructions=True, **keys))]) == 0
    return pack(folder / "run", folder / "packed" / NAME, PackOptions(NAME))


def spoil(folder):
    """Give a packed folder a fault that its record knows: the pooling of a wider model."""
    pooling = folder / "1_Pooling/config.json"
    pooling.write_text(pooling.read_text().replace("32", "64"))
    hashes = json.loads((folder / RECORD).read_text())["sha256"]
    rewrite_json(folder / RECORD, sha256={**hashes, "1_Pooling/config.json": Content(pooling).sha256})


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_adapter(folder, base, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_single_stage(folder, **{"model": str(base), "lora": True, "lora_rank": 4, **NO_NEW_MODEL, **keys})
    assert main([str(recipe)]) == 0
    return folder / "run"


def put_in_cache(folder, name=BASE):
    """Copy a model to where the Hub's client keeps those that it downloaded; return the copy."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(COMMIT)
    return Path(shutil.copytree(folder, place / "snapshots" / COMMIT))


def change_weights(path, change):
    """Change the tensors of a file; what becomes None is dropped."""
    changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: each.contiguous() for name, each in changed.items() if each is not None}, path, {"format": "pt"})


def rewrite_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite_recipe(run, **keys):
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def metadata_of(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


# The embeddings take a separate process and ten seconds: they have their own tests.
QUICK = {name: checks for name, checks in CHECKS.items() if name != "embeddings"}
QUICK_FOR_ADAPTERS = {name: checks for name, checks in ADAPTER_CHECKS.items() if name != "embeddings"}


class BrokenRelease:
    """A copy of a packed folder, whose files are links to the original; ``base`` is that of an adapter."""

    def __init__(self, release, folder):
        self.folder, self.base = folder, None
        self._checks = QUICK_FOR_ADAPTERS if (release / "adapter_config.json").is_file() else QUICK
        shutil.copytree(release, folder, copy_function=os.link)

    def write(self, name, content, listed=True):
        """Replace a file or add one; with ``listed``, the record gives its size."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        if listed and name != RECORD:
            self.list_sizes()

    def read(self, name):
        return json.loads((self.folder / name).read_text())

    def edit(self, name, change=lambda content: None, **keys):
        """Change a JSON file: by a function in place, or its keys, of which ``...`` deletes one."""
        content = self.read(name)
        change(content)
        if keys:
            content = {key: value for key, value in {**content, **keys}.items() if value is not ...}
        self.write(name, json.dumps(content))

    def replace(self, name, old, new):
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def edit_weights(self, change, file="model.safetensors"):
        tensors = load_file(self.folder / file)
        change(tensors)
        self.write(file, save(tensors, metadata={"format": "pt"}))

    def list_sizes(self):
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.name != RECORD]
        contents = {path.relative_to(self.folder).as_posix(): Content(path) for path in paths}
        sizes, hashes = ({name: getattr(each, key) for name, each in contents.items()} for key in ("size", "sha256"))
        self.write(RECORD, json.dumps({**self.read(RECORD), "files": sizes, "sha256": hashes}))

    def examine(self):
        return examine(self.folder, self._checks, self.base)

    def faults(self):
        return [str(fault) for fault in self.examine().faults]

    def expect(self, *expected):
        """Assert that the faults are these and no others: of each a file and parts of what is said."""
        faults = self.faults()
        assert len(faults) == len(expected), faults
        for fault, (file, *parts) in zip(sorted(faults), sorted(expected), strict=True):
            assert fault.startswith(f"{file}: ") and len(fault.splitlines()) == 1, fault
            assert all(part in fault for part in parts), fault
