"""A packed folder as the checks read it: every file once, and damage as an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.common.errors import UserError, in_one_line
from training.publishing.adapter_base import BaseModel, base_at_hand, read_base
from training.publishing.record import RECORD, ModelRelease, load_release

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODULES = "modules.json"
SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
TRANSFORMER_MODULE = "sentence_bert_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
# What the Hub's client notes of its downloads and uploads; no program sends it.
CLIENT_NOTES = ".cache/huggingface/"


@dataclass(frozen=True)
class Finding:
    """What a check has to say about a file.

    Attributes:
        file: Its path in the folder.
        wrong: What is wrong.
        remedy: What to do.
        fault: Whether the folder must not be released like this; otherwise it is a notice.
    """

    file: str
    wrong: str
    remedy: str
    fault: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.wrong.split())}; {self.remedy}"


class UnreadableError(Exception):
    """A file of the folder is missing or damaged; whatever needs it cannot be checked."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file}: {why}")
        self.file, self.why = file, why


class PackedFolder:
    """The files of a packed folder, read when they are asked for.

    Args:
        path: The folder.
        base: Folder of the model that it adapts; in the Hub's cache if None. Only for an adapter.
    """

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path = path
        self._given_base = None if base is None else base.absolute()
        self._tables: dict[str, Any] = {}

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter, by its files or its record."""
        if ADAPTER_CONFIG in self.files:
            return True
        try:
            return self.release.is_adapter
        except UnreadableError:
            return False

    @cached_property
    def base(self) -> BaseModel | None:
        """The model that an adapter adapts; None if it is not at hand, and for a whole model.

        Raises:
            UnreadableError: If the record is damaged.
        """
        adapter = self.release.adapter
        if not self.is_adapter or adapter is None:
            return None
        if self._given_base is not None:
            return read_base(self._given_base)
        return base_at_hand(adapter.base.name, adapter.base.revision)

    def model_config(self) -> dict[str, Any] | None:
        """The configuration of the model, for an adapter its base's; None if that is not at hand.

        Raises:
            UnreadableError: If it is damaged.
        """
        if not self.is_adapter:
            return self.table(CONFIG)
        return None if self.base is None else json.loads((self.base.folder / CONFIG).read_text(encoding="utf-8"))

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of every file, by its path with forward slashes, but for the notes of the Hub's client."""
        found = (path for path in self.path.rglob("*") if path.is_file() or path.is_symlink())
        sizes = {
            path.relative_to(self.path).as_posix(): (path.lstat() if self.is_link(path) else path.stat()).st_size
            for path in sorted(found)
        }
        return {name: size for name, size in sizes.items() if not name.startswith(CLIENT_NOTES)}

    def is_link(self, path: Path) -> bool:
        """Whether a file is a link, other than those of the client's cache, which keeps each content once."""
        if not path.is_symlink():
            return False
        kept = self.path.parent.parent / "blobs"
        return not (self.path.parent.name == "snapshots" and path.is_file() and path.resolve().parent == kept)

    def text(self, name: str) -> str:
        """The text of a file.

        Raises:
            UnreadableError: If it is missing or not UTF-8.
        """
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UnreadableError(name, "is missing") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableError(name, f"cannot be read ({in_one_line(error)})") from None

    def json(self, name: str) -> Any:
        """The content of a JSON file.

        Raises:
            UnreadableError: If it is missing or damaged.
        """
        if name not in self._tables:
            try:
                self._tables[name] = json.loads(self.text(name))
            except (ValueError, RecursionError) as error:
                raise UnreadableError(name, f"is not JSON ({in_one_line(error)})") from None
        return self._tables[name]

    def table(self, name: str) -> dict[str, Any]:
        """The content of a JSON file that holds one object.

        Raises:
            UnreadableError: If it is missing, damaged, or holds something else.
        """
        content = self.json(name)
        if not isinstance(content, dict):
            raise UnreadableError(name, f"holds a {type(content).__name__} where an object is expected")
        return content

    @cached_property
    def release(self) -> ModelRelease:
        """The record of the release.

        Raises:
            UnreadableError: If it is missing or damaged.
        """
        self.table(RECORD)
        try:
            return load_release(self.path)
        except UserError as error:
            raise UnreadableError(RECORD, f"is damaged ({in_one_line(error)})") from None

    def modules(self) -> Iterator[dict[str, Any]]:
        """The entries of ``modules.json``.

        Raises:
            UnreadableError: If it is missing or damaged.
        """
        content = self.json(MODULES)
        if not isinstance(content, list) or not all(
            isinstance(entry, dict) and {"path", "type"} <= entry.keys() for entry in content
        ):
            raise UnreadableError(MODULES, "is no list of modules with path and type")
        return iter(content)

    def pooling(self) -> tuple[str, dict[str, Any]]:
        """Path and content of the pooling module's configuration.

        Raises:
            UnreadableError: If there is none.
        """
        for entry in self.modules():
            if str(entry["type"]).endswith(".Pooling"):
                name = f"{entry['path']}/config.json"
                return name, self.table(name)
        raise UnreadableError(MODULES, "names no pooling module")
