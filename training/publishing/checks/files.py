"""A packed folder as the checks read it, and checks of its files, an adapter's base and remote code.

A check raises UserError for a fault that ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.hub import ATTRIBUTES
from training.models.encoders import foreign_files
from training.models.model_folder import load_json
from training.models.model_ref import base_revision
from training.publishing.adapter import BaseModel, adapter_fields, cached_base, read_adapter_files, read_base
from training.publishing.card import CARD
from training.publishing.model_files import ADAPTER_CONFIG, AUTO_MAP, CONFIG, ModelFiles, read_model_files
from training.publishing.record import RECORD, ModelRelease, changed_files, contents_of, load_release
from training.publishing.states import is_hub_name

REPACK = "pack the run again"
# Notes of the Hub's client on its downloads and uploads, which are never uploaded.
_CLIENT_NOTES = ".cache/huggingface/"
# Files that can run code when they are loaded.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".joblib")


@dataclass(frozen=True)
class Finding:
    """What a check says about a file."""

    file: str
    wrong: str
    remedy: str = REPACK
    fault: bool = True  # whether the folder must not be released like this; otherwise it is a notice

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.wrong.split())}; {self.remedy}"


class PackedFolder:
    """The files of a packed folder, read on demand; the ``base`` of an adapter is in the Hub's cache if not given."""

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path, self._given_base = path, base and base.absolute()

    @cached_property
    def files(self) -> dict[str, Path]:
        """Every file, by its path in the folder with forward slashes."""
        found = sorted(path for path in self.path.rglob("*") if path.is_file() or path.is_symlink())
        names = {path.relative_to(self.path).as_posix(): path for path in found}
        return {name: path for name, path in names.items() if not name.startswith(_CLIENT_NOTES)}

    def json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        return load_json(self.path / name, REPACK)

    @cached_property
    def card(self) -> str:
        """The text of the card."""
        return (self.path / CARD).read_text(encoding="utf-8")

    @cached_property
    def release(self) -> ModelRelease:
        """The record of the release."""
        return load_release(self.path)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, by its files."""
        return ADAPTER_CONFIG in self.files

    @cached_property
    def base(self) -> BaseModel | None:
        """The base of an adapter; None if it is not on this machine, and for a whole model."""
        adapter = self.release.adapter
        if not self.is_adapter or adapter is None:
            return None
        if self._given_base is not None:
            return read_base(self._given_base)
        return cached_base(adapter.base.name, adapter.base.revision)

    @cached_property
    def model(self) -> ModelFiles:
        """The model or adapter, read as that of a run is read to be packed."""
        return read_adapter_files(self.path, self.base) if self.is_adapter else read_model_files(self.path)

    @property
    def config(self) -> dict[str, Any] | None:
        """``config.json`` of the model or of an adapter's base; None if the base is not on this machine."""
        folder = self.path if not self.is_adapter else self.base and self.base.folder
        return folder and load_json(folder / CONFIG, REPACK)


def check_contents(packed: PackedFolder) -> Iterator[Finding]:
    """Everything is there as it was packed, and nothing else: no caches, pickles or links."""
    # The Hub's cache stores each content once, and links to it.
    blobs = packed.path.parents[1] / "blobs" if packed.path.parent.name == "snapshots" else None
    for file, path in packed.files.items():
        if file.endswith(_PICKLES):
            yield Finding(file, "is not safetensors: files of this kind can run code", "delete it")
        elif "/." in f"/{file}" and file != ATTRIBUTES:
            yield Finding(file, "does not belong in a release", "delete it")
        elif path.is_symlink() and path.resolve().parent != blobs:
            yield Finding(file, "is a link: its target would not be uploaded", "copy the file here")
    # Scores hold for the weights that were packed only.
    for file in changed_files(vars(packed.release), contents_of(packed.path)):
        yield Finding(file, f"was changed, added or deleted since {RECORD} was written")


def check_record(packed: PackedFolder) -> Iterator[Finding]:
    """The record has the shape, widths, length, prompts, parameters and dtype that the files give."""
    if packed.is_adapter and packed.base is None:
        # Some fields depend on the base; `check_base` says that it is not here.
        return
    for name, value in {**packed.model.fields(), "dtype": packed.model.weights.dtype}.items():
        if getattr(packed.release, name) != value:
            yield Finding(RECORD, f"{name} is {getattr(packed.release, name)}, but the files give {value}")


def check_base(packed: PackedFolder) -> Iterator[Finding]:
    """The base is the Hub repository of the record, and has the weights that it had when the adapter was packed."""
    adapter, table = packed.release.adapter, packed.json(ADAPTER_CONFIG)
    if adapter is None or adapter.merged:
        raise UserError(f"{RECORD}: has no adapter, but the folder holds one", REPACK)
    named = table.get("base_model_name_or_path")
    if named != adapter.base.name or not is_hub_name(named):
        wrong = f"base_model_name_or_path is {named!r}, not {adapter.base.name!r}"
        yield Finding(ADAPTER_CONFIG, wrong, "pack again with --base ORG/NAME")
    if packed.base is None:
        wrong = f"not checked against its base {adapter.base.name}, which is not on this machine"
        yield Finding(ADAPTER_CONFIG, wrong, "give its folder as --base FOLDER", fault=False)
    elif adapter.base_weights not in (None, base_revision(str(packed.base.folder), "--base")):
        wrong = f"{packed.base.folder} has other weights than {adapter.base.name} had when the adapter was packed"
        yield Finding(ADAPTER_CONFIG, wrong, "give that model as --base FOLDER, or pack the run again")
    for name, value in adapter_fields(table).items():
        if value != getattr(adapter, name):
            yield Finding(RECORD, f"its {name} is {getattr(adapter, name)!r}, but {ADAPTER_CONFIG} has {value!r}")


def check_remote_code(packed: PackedFolder) -> Iterator[Finding]:
    """``auto_map`` names our classes, and the code is that of this checkout."""
    found = packed.json(CONFIG).get("auto_map")
    if found != AUTO_MAP:
        yield Finding(CONFIG, f"auto_map is {found!r}, not {AUTO_MAP!r}")
    for file in foreign_files(packed.path):
        # Older code may be right, but is not what is tested here.
        wrong = "differs from modeling_f2llm of this checkout"
        yield Finding(file, wrong, "pack the run again for the newer code", fault=False)


def foreign_code(packed: PackedFolder) -> list[str]:
    """Return the files of code that loading the model may run and that differ from this checkout's."""
    folders = [packed.path] if packed.base is None else [packed.path, packed.base.folder]
    return [file for folder in folders for file in foreign_files(folder)]
