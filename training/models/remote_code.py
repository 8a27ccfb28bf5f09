"""Whose code a model's folder would run: this package's own, byte for byte, or anyone's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import modeling_f2llm
from training.models.adapter_folder import base_of

_PACKAGE = Path(modeling_f2llm.__file__).resolve().parent
# Those of this package's models. Where code is trusted, the settings of others may name what is called: Dense calls
# whatever its activation_function is.
_MODULES = (".Transformer", ".Pooling", ".Normalize")


def has_code(place: str) -> bool:
    """Whether a model's folder, or that of an adapter's base, names code that is beside it or in another repository.

    sentence-transformers saves a model with the names of code that it has not run, and without that code.
    """
    folders = [Path(each) for each in {place, base_of(place)}]
    named = [(folder, name) for folder in folders for name in _named_code(folder)]
    return any("--" in name or _file_of(name, folder).is_file() for folder, name in named)


def runs_own_code(place: str) -> bool:
    """Whether a folder brings the code that its settings name, and all of it is this package's: it needs no asking.

    The files are compared byte for byte. Code that the settings name elsewhere, in another repository or an installed
    package, is not this package's. An adapter brings none; its base's is looked at.

    Args:
        place: Folder or Hub name of a model or an adapter. What comes from the Hub is never trusted.
    """
    folders = [Path(each) for each in {place, base_of(place)}]
    if not all(folder.is_dir() for folder in folders):
        return False
    named = [(folder, name) for folder in folders for name in _named_code(folder)]
    own = all(_is_own(_file_of(name, folder), folder) for folder, name in named)
    return bool(named) and own and not any(map(foreign_files, folders))


def foreign_files(folder: Path) -> list[str]:
    """The files of code in a folder that are not this package's, byte for byte, and where this package's belong."""
    files = sorted(folder.rglob("*.py"))
    return [path.relative_to(folder).as_posix() for path in files if not _is_own(path, folder)]


def _file_of(name: str, folder: Path) -> Path:
    return folder / f"{name.rpartition('.')[0]}.py"


def _is_own(path: Path, folder: Path) -> bool:
    own = _PACKAGE / path.name
    return path.parent == folder and path.is_file() and own.is_file() and own.read_bytes() == path.read_bytes()


def _named_code(folder: Path) -> list[str]:
    """What a folder's settings want to be loaded from code beside them or elsewhere, and modules that load more."""
    # Those of modules lie in folders of their own.
    maps = (_read(path).get("auto_map") for path in folder.rglob("*config*.json"))
    values = [value for each in maps if isinstance(each, dict) for value in each.values()]
    # A tokenizer's are two, a slow and a fast one.
    classes = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = _read(folder / "modules.json", list)
    types = [str(module.get("type")) for module in modules if isinstance(module, dict)]
    ours = [name for name in types if name.startswith("sentence_transformers.") and name.endswith(_MODULES)]
    return [*(str(name) for name in classes if name), *(name for name in types if name not in ours)]


def _read(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file; nothing if it is damaged, which loading the model says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()
