"""A packed folder as the checks read it: every file once, with errors that name a damaged file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from training.common.errors import UserError, in_one_line
from training.publishing.adapter import BaseModel, cached_base, read_base
from training.publishing.model_files import ADAPTER_CONFIG, CONFIG, MODULES
from training.publishing.record import RECORD, ModelRelease, load_release
from training.publishing.weights import read_header

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


class UnreadableError(Exception):
    """A file is missing or damaged, so that what depends on it cannot be checked."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file}: {why}")
        self.file, self.why = file, why


class PackedFolder:
    """The files of a packed folder, read on demand; every method raises :class:`UnreadableError` for a damaged file.

    Args:
        path: The folder.
        base: Folder of an adapter's base; in the Hub's cache if None.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path = path
        self._given_base = None if base is None else base.absolute()
        self._content: dict[str, Any] = {}

    @cached_property
    def files(self) -> dict[str, int]:
        """Size in bytes of every file, by its path with forward slashes."""
        found = (path for path in self.path.rglob("*") if path.is_file() or path.is_symlink())
        sizes = {
            path.relative_to(self.path).as_posix(): (path.lstat() if self.is_link(path) else path.stat()).st_size
            for path in sorted(found)
        }
        return {name: size for name, size in sizes.items() if not name.startswith(_CLIENT_NOTES)}

    def is_link(self, path: Path) -> bool:
        """Whether a file is a link, other than those of the Hub's cache, which stores each content once."""
        if not path.is_symlink():
            return False
        blobs = self.path.parent.parent / "blobs"
        return not (self.path.parent.name == "snapshots" and path.is_file() and path.resolve().parent == blobs)

    def text(self, name: str) -> str:
        """Return the text of a file."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UnreadableError(name, "is missing") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableError(name, f"cannot be read ({in_one_line(error)})") from None

    def json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        if name not in self._content:
            try:
                self._content[name] = json.loads(self.text(name))
            except (ValueError, RecursionError) as error:
                raise UnreadableError(name, f"is not JSON ({in_one_line(error)})") from None
        return self._content[name]

    def table(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file that holds an object."""
        content = self.json(name)
        if not isinstance(content, dict):
            raise UnreadableError(name, f"holds a {type(content).__name__} where an object is expected")
        return content

    def header(self, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of each tensor of a safetensors file."""
        if name not in self._content:
            try:
                with safe_open(self.path / name, framework="pt") as stored:
                    if (stored.metadata() or {}).get("format") != "pt":
                        wrong = "lacks the metadata 'format: pt', without which transformers refuses it"
                        raise UnreadableError(name, wrong)
                self._content[name] = read_header(self.path / name)
            except (OSError, SafetensorError) as error:
                raise UnreadableError(name, f"is not a safetensors file ({in_one_line(error)})") from None
        return self._content[name]

    def modules(self) -> list[dict[str, Any]]:
        """Return the entries of ``modules.json``."""
        content = self.json(MODULES)
        if not isinstance(content, list) or not all(
            isinstance(entry, dict) and {"path", "type"} <= entry.keys() for entry in content
        ):
            raise UnreadableError(MODULES, "is not a list of modules with path and type")
        return content

    def pooling_file(self) -> str:
        """Return the path of the pooling module's configuration."""
        for entry in self.modules():
            if str(entry["type"]).endswith(".Pooling"):
                return f"{entry['path']}/config.json"
        raise UnreadableError(MODULES, "names no pooling module")

    @cached_property
    def release(self) -> ModelRelease:
        """The record of the release."""
        self.table(RECORD)
        try:
            return load_release(self.path)
        except UserError as error:
            raise UnreadableError(RECORD, f"is damaged ({in_one_line(error)})") from None

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, by its files or its record."""
        try:
            return ADAPTER_CONFIG in self.files or self.release.is_adapter
        except UnreadableError:
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

    def model_config(self) -> dict[str, Any] | None:
        """Return ``config.json`` of the model or of an adapter's base; None if the base is not on this machine."""
        if not self.is_adapter:
            return self.table(CONFIG)
        return None if self.base is None else json.loads((self.base.folder / CONFIG).read_text(encoding="utf-8"))
