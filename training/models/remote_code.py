"""Whose code a model's folder would run: this package's own, byte for byte, or anyone's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import modeling_f2llm
from training.adapter_folder import base_of

__all__ = ["has_code", "runs_own_code"]

_PACKAGE = Path(modeling_f2llm.__file__).resolve().parent


def has_code(place: str) -> bool:
    """Whether a model's folder, or that of an adapter's base, names code to be loaded with it."""
    return any(_named_code(Path(each)) for each in {place, base_of(place)})


def runs_own_code(place: str) -> bool:
    """Whether a folder brings code, and all of it is this package's: it can be run without asking.

    The files are compared byte for byte. Code that the settings name elsewhere, in another repository or an installed
    package, is not this package's. An adapter brings none; its base's is looked at.

    Args:
        place: Folder or Hub name of a model or an adapter. What comes from the Hub is never trusted.
    """
    folders = [Path(each) for each in {place, base_of(place)}]
    if not all(folder.is_dir() for folder in folders):
        return False
    named = [name for folder in folders for name in _named_code(folder)]
    return bool(named) and all(map(_is_own, folders)) and not any("--" in name or "/" in name for name in named)


def _is_own(folder: Path) -> bool:
    return not _foreign_modules(folder) and all(_same(path, folder) for path in folder.rglob("*.py"))


def _same(path: Path, folder: Path) -> bool:
    own = _PACKAGE / path.name
    return path.parent == folder and own.is_file() and own.read_bytes() == path.read_bytes()


def _named_code(folder: Path) -> list[str]:
    """The classes that a folder's settings want to be loaded from code beside them or elsewhere."""
    # Those of modules lie in folders of their own.
    maps = (_read(path).get("auto_map") for path in folder.rglob("*config*.json"))
    values = [value for each in maps if isinstance(each, dict) for value in each.values()]
    # A tokenizer's are two, a slow and a fast one.
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [str(name) for name in classes if name] + _foreign_modules(folder)


def _foreign_modules(folder: Path) -> list[str]:
    """Types of modules that are not of sentence-transformers."""
    modules = _read(folder / "modules.json", list)
    types = [str(module.get("type")) for module in modules if isinstance(module, dict)]
    return [name for name in types if not name.startswith("sentence_transformers.")]


def _read(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file; nothing if it is damaged, which loading the model says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()
