"""YAML files that people write: read strictly, with errors that name the file, and with relative paths resolved.

What a recipe reads is relative to the folder of the file that names it. What it writes is relative to the working
directory: ``output_dir``, ``prepared_dir``, ``teacher_cache_dir``, the manifest of a ``builder``, and everything below
these. A model that does not lie beside the recipe was written by a run, or is on the Hub. On the command line all paths
are relative to the working directory.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from training.common.errors import UserError, in_one_line

RULE = (
    "a relative path starts at the folder of the file in which it stands, on the command line at the working directory"
)
_WRITTEN = ("output_dir", "prepared_dir", "teacher_cache_dir")
_READ = ("manifest", "data_dir", "evaluation_pairs", "evaluation_candidates", "fsdp_config", "deepspeed")
_MODELS = ("model", "teacher", "tokenizer", "importance")
PATH_KEYS = (*_WRITTEN, *_READ, *_MODELS)


# libyaml reads a manifest of thousands of lines ten times as fast; not every build of PyYAML has it.
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML 1.1, except where it loses what was written: `1e-5` is a number, a date is text, keys must be unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in written:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
                written.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(path: Path, named_in_file: bool = False) -> dict[str, Any]:
    """Read a YAML mapping; if it may be ``named_in_file``, errors explain relative paths."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        rule = f" ({RULE})" if named_in_file else ""
        raise UserError(f"{path}: no such file; check the path{rule}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a YAML file") from None
    # A number of thousands of digits, for one, raises a ValueError.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({in_one_line(error)}); correct that line") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def unknown_key(where: str, key: Any, known: Sequence[str], meant: Mapping[str, str] | None = None) -> UserError:
    """Return the error for an unknown key, with the known one that was probably meant.

    ``meant`` has known keys by their names in other programs.
    """
    name = str(key)
    other = (meant or {}).get(name.lower())
    if other in known:
        near = [other]
    # Half the letters of short words are equal by chance: "lr" is near "lora".
    elif len(name) <= 3:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        near = near or [each for each in known if each.startswith(name)]
    else:
        near = difflib.get_close_matches(name, known, n=1)
    listed = f"known keys are {', '.join(sorted(known))}" if len(known) < 20 else "--help lists the known ones"
    return UserError(f"{where}: unknown key {key!r}; {f'did you mean {near[0]!r}?' if near else listed}")


class _InFile(str):
    """A path in a file, with the folder of that file."""

    __slots__ = ("folder",)
    folder: Path


def in_file(file: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe file with paths that remember the file's folder."""
    result = dict(keys)
    for key in (*_READ, *_MODELS):
        # Some keys take JSON instead of a path.
        if isinstance(keys.get(key), str) and not keys[key].lstrip().startswith("{"):
            result[key] = _InFile(keys[key])
            result[key].folder = file.parent
    options = keys.get("builder_options")
    if isinstance(options, str):
        # Text that is not JSON is refused where the key is read.
        with suppress(ValueError):
            options = json.loads(options)
    if isinstance(options, dict) and isinstance(options.get("locale_dirs"), list):
        folders = [_from_file(file.parent, each) if isinstance(each, str) else each for each in options["locale_dirs"]]
        result["builder_options"] = {**options, "locale_dirs": folders}
    return result


def placed(keys: Mapping[str, Any], output_dir: str | None = None) -> dict[str, Any]:
    """Resolve the paths of a stage's merged keys, which :func:`in_file` marked, to the working directory.

    ``output_dir`` is that of the recipe, which the command line may have replaced in ``keys``.
    """
    folders = [os.path.normpath(str(each)) for each in (output_dir, keys.get("output_dir")) if each is not None]
    # Every relative path lies below the working directory: it says nothing about a path.
    written = [folder for folder in folders if folder != "."]
    if keys.get("builder") is not None and keys.get("manifest") is not None:
        written.append(os.path.normpath(os.path.dirname(str(keys["manifest"]))))
    return {key: _placed(key, value, written) if isinstance(value, _InFile) else value for key, value in keys.items()}


def _placed(key: str, value: _InFile, written: list[str]) -> str:
    text = str(value)
    if "://" in text or any(Path(os.path.normpath(text)).is_relative_to(folder) for folder in written):
        return text
    if key in _MODELS and ((key, text) == ("tokenizer", "train") or not os.path.exists(value.folder / text)):
        return text
    return _from_file(value.folder, text)


def _from_file(folder: Path, path: str) -> str:
    """Return a path in a file of a folder, seen from the working directory."""
    if os.path.isabs(path):
        return path
    there = os.path.join(folder, path)
    short = os.path.relpath(there)
    # Behind a link, `..` leads somewhere else.
    return short if os.path.realpath(short) == os.path.realpath(there) else os.path.join(os.path.abspath(folder), path)
