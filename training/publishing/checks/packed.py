"""A packed folder as the checks read it, and what they say about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.common.errors import UserError, in_one_line
from training.publishing.adapter import BaseModel, cached_base, read_adapter_files, read_base
from training.publishing.model_files import ADAPTER_CONFIG, CONFIG, ModelToPack
from training.publishing.pack import read_whole_model
from training.publishing.record import RECORD, ModelRelease, load_release
from training.publishing.states import ModelState

CARD = "README.md"
REPACK = "pack the run again"
# Notes of the Hub's client on its downloads and uploads, which are never uploaded.
_CLIENT_NOTES = ".cache/huggingface/"


@dataclass(frozen=True)
class Finding:
    """What a check says about a file."""

    file: str
    wrong: str
    remedy: str = REPACK
    fault: bool = True  # whether the folder must not be released like this; otherwise it is a notice

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.wrong.split())}; {self.remedy}"


class FaultError(Exception):
    """A fault that ends a check."""

    def __init__(self, file: str, wrong: str, remedy: str = REPACK) -> None:
        super().__init__(wrong)
        self.finding = Finding(file, wrong, remedy)


class PackedFolder:
    """The files of a packed folder, read on demand.

    Args:
        path: The folder.
        base: Folder of an adapter's base; in the Hub's cache if None.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path = path
        self._given_base = None if base is None else base.absolute()

    @cached_property
    def files(self) -> dict[str, int]:
        """Size in bytes of every file, by its path with forward slashes."""
        found = sorted(path for path in self.path.rglob("*") if path.is_file() or path.is_symlink())
        sizes = {path.relative_to(self.path).as_posix(): path for path in found}
        return {
            name: path.stat().st_size if path.exists() else 0
            for name, path in sizes.items()
            if not name.startswith(_CLIENT_NOTES)
        }

    def is_link(self, name: str) -> bool:
        """Return whether a file is a link, other than those of the Hub's cache, which stores each content once."""
        path, blobs = self.path / name, self.path.parent.parent / "blobs"
        is_cached = self.path.parent.name == "snapshots" and path.is_file() and path.resolve().parent == blobs
        return path.is_symlink() and not is_cached

    def text(self, name: str) -> str:
        """Return the text of a file."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FaultError(name, f"cannot be read ({in_one_line(error)})") from None

    def json(self, name: str, kind: type = dict) -> Any:
        """Return the content of a JSON file."""
        try:
            content = json.loads(self.text(name))
        except ValueError as error:
            raise FaultError(name, f"is not JSON ({in_one_line(error)})") from None
        if not isinstance(content, kind):
            raise FaultError(name, f"holds a {type(content).__name__}, not a {kind.__name__}")
        return content

    @cached_property
    def release(self) -> ModelRelease:
        """The record of the release."""
        try:
            return load_release(self.path)
        except UserError as error:
            raise FaultError(RECORD, f"is damaged ({in_one_line(error)})") from None

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, by its files or its record."""
        try:
            return ADAPTER_CONFIG in self.files or self.release.is_adapter
        except FaultError:
            return False

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
    def model(self) -> ModelToPack:
        """The model or adapter, read as that of a run is read to be packed."""
        try:
            if self.is_adapter:
                return read_adapter_files(self.path, self.base)
            return read_whole_model(ModelState(self.path, self.path, {}))
        except UserError as error:
            wrong, _, remedy = in_one_line(error).replace(f"{self.path}/", "").partition("; ")
            raise FaultError("the model", wrong, remedy or REPACK) from None

    @property
    def config(self) -> dict[str, Any] | None:
        """``config.json`` of the model or of an adapter's base; None if the base is not on this machine."""
        if not self.is_adapter:
            return self.json(CONFIG)
        return None if self.base is None else json.loads((self.base.folder / CONFIG).read_text(encoding="utf-8"))
