"""Where the relative paths of a recipe lead.

What a recipe reads starts at the folder of the file in which it stands. What it writes starts at the working directory:
``output_dir``, ``prepared_dir``, ``teacher_cache_dir``, the manifest of a ``builder``, and whatever lies below these. A
model that does not lie beside the recipe is what a run wrote, or is on the Hub. On the command line all paths start at
the working directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

RULE = (
    "a relative path starts at the folder of the file in which it stands, on the command line at the working directory"
)

_WRITTEN = ("output_dir", "prepared_dir", "teacher_cache_dir")
_READ = ("manifest", "data_dir", "evaluation_pairs", "evaluation_candidates", "fsdp_config", "deepspeed")
_MODELS = ("model", "teacher", "tokenizer", "importance")
PATH_KEYS = (*_WRITTEN, *_READ, *_MODELS)


class _InFile(str):
    """A path as a file has it, with the folder of that file."""

    __slots__ = ("folder",)
    folder: Path


def in_file(file: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a file, of which the paths know where they stand."""
    result = dict(keys)
    for key in (*_READ, *_MODELS):
        # Of some, a text may be JSON instead.
        if isinstance(keys.get(key), str) and not keys[key].lstrip().startswith("{"):
            result[key] = _InFile(keys[key])
            result[key].folder = file.parent
    options = keys.get("builder_options")
    if isinstance(options, str):
        # A text that is no JSON is refused where the key is read.
        with suppress(ValueError):
            options = json.loads(options)
    if isinstance(options, dict) and isinstance(options.get("locale_dirs"), list):
        folders = [_from_file(file.parent, each) if isinstance(each, str) else each for each in options["locale_dirs"]]
        result["builder_options"] = {**options, "locale_dirs": folders}
    return result


def placed(keys: Mapping[str, Any], output_dir: str | None = None) -> dict[str, Any]:
    """All keys of a stage, with paths that start at the working directory.

    Args:
        keys: As :func:`in_file` gives them, merged with those of other files and of the command line.
        output_dir: Where the recipe writes, as it says itself.
    """
    folders = [str(each) for each in (output_dir, keys.get("output_dir")) if each is not None]
    # All relative paths lie below the working directory, whatever they mean.
    written = [folder for folder in folders if os.path.normpath(folder) != "."]
    if keys.get("builder") is not None and keys.get("manifest") is not None:
        written.append(os.path.dirname(str(keys["manifest"])))
    return {key: _placed(key, value, written) if isinstance(value, _InFile) else value for key, value in keys.items()}


def _placed(key: str, value: _InFile, written: list[str]) -> str:
    text = str(value)
    if "://" in text or any(_is_below(text, folder) for folder in written):
        return text
    if key in _MODELS and ((key, text) == ("tokenizer", "train") or not os.path.exists(value.folder / text)):
        return text
    return _from_file(value.folder, text)


def _is_below(path: str, folder: str) -> bool:
    return Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder))


def _from_file(folder: Path, path: str) -> str:
    """A path that stands in a file of a folder, as it is from the working directory."""
    if os.path.isabs(path):
        return path
    there = os.path.join(folder, path)
    short = os.path.relpath(there)
    # Past a link, `..` leads elsewhere than it reads.
    return short if os.path.realpath(short) == os.path.realpath(there) else os.path.join(os.path.abspath(folder), path)


def from_run(key: str, keys: Mapping[str, Any]) -> Any:
    """A value of a run's keys that is the same from every working directory: a path as it is seen from the run."""
    value, output_dir = keys.get(key), keys.get("output_dir")
    if key not in PATH_KEYS or not isinstance(value, str) or output_dir is None:
        return value
    if "://" in value or os.path.isabs(value) != os.path.isabs(str(output_dir)):
        return value
    return os.path.relpath(value, str(output_dir))


def place_of(run: Path, keys: Mapping[str, Any], written: str) -> Path:
    """Where a path of a run's recipe leads now.

    A recipe's paths hold for the working directory in which it ran. That one is not known later, but the run's folder
    is: what lies beside it is found from there, even if all of it was moved together.

    Args:
        run: The folder of the run.
        keys: Its recipe.
        written: The path as the recipe has it.
    """
    output_dir = str(keys.get("output_dir", ""))
    if os.path.isabs(written) == os.path.isabs(output_dir):
        # Not resolved: `..` of a run that is a link leads to where the link lies, as it did in training.
        beside = Path(os.path.normpath(run.absolute() / os.path.relpath(written, output_dir)))
        if beside.exists():
            return beside
    return Path(written)
