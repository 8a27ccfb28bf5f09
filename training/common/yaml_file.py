"""YAML files that people write: read strictly, with errors that name the file, and with relative paths resolved.

What a recipe reads starts at the folder of the file that names it. At the working directory start paths of the command
line, what a recipe writes, and models or own data that do not lie beside the recipe: a run made them, or the Hub did.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from training.common.errors import UserError, in_one_line

RULE = "a relative path starts at its file's folder; a model's, if nothing is there, at the working directory"
_MODELS = ("model", "teacher", "tokenizer", "importance", "miner", "reranker")
_READ = ("manifest", "data_dir", "evaluation_pairs", "evaluation_candidates", "fsdp_config", "deepspeed", *_MODELS)
# Files, folders or names of the Hub.
_DATA = ("data", "elsewhere", "replay_data")
PATH_KEYS = ("output_dir", "prepared_dir", "teacher_cache_dir", *_READ)


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


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a YAML file") from None
    # A number of thousands of digits, for one, raises a ValueError.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({in_one_line(error)}); correct that line") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def unknown_key(where: str, key: Any, known: Sequence[str]) -> UserError:
    """Return the error for an unknown key, with the known one that was probably meant."""
    # Half the letters of short words are equal by chance: "lr" is near "lora".
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.6 if len(str(key)) > 3 else 0.75)
    listed = f"known keys are {', '.join(sorted(known))}" if len(known) < 20 else "--help lists the known ones"
    return UserError(f"{where}: unknown key {key!r}; {f'did you mean {near[0]!r}?' if near else listed}")


def written_by(keys: Mapping[str, Any]) -> set[str]:
    """Return the folders that the keys of a recipe write to: the output, a builder's manifest and its folder."""
    manifest = str(keys.get("manifest") or "") if keys.get("builder") else ""
    folders = (keys.get("output_dir"), manifest, os.path.dirname(manifest))
    # All relative paths lie below the working directory.
    return {os.path.normpath(str(folder)) for folder in folders if folder} - {"."}


def with_paths(
    file: Path, keys: Mapping[str, Any], stages: Collection[str] = (), written: Collection[str] = ()
) -> dict[str, Any]:
    """Return the keys of a recipe file, with the paths of what they read as seen from here.

    Models may be names of ``stages``; ``tokenizer: train`` trains one. What lies below a folder that is ``written``
    starts at the working directory.
    """
    result = dict(keys)
    for key in _READ:
        path = keys.get(key)
        # Some keys take JSON, addresses or true.
        if not isinstance(path, str) or path.startswith("{") or "://" in path:
            continue
        if key in _MODELS:
            named = path in stages or (key, path) == ("tokenizer", "train") or not (file.parent / path).exists()
        else:
            named = any(Path(os.path.normpath(path)).is_relative_to(folder) for folder in written)
        result[key] = path if named else _beside(file, path)
    for key in {*_DATA} & keys.keys():
        given = keys[key]
        found = [_data_beside(file, str(each)) for each in (given if isinstance(given, list) else [given])]
        result[key] = found if isinstance(given, list) else found[0]
    options = keys.get("builder_options")
    if isinstance(options, str):
        # Text that is not JSON is refused where the key is read.
        with suppress(ValueError):
            options = json.loads(options)
    if isinstance(options, dict) and isinstance(folders := options.get("locale_dirs"), list):
        result["builder_options"] = {**options, "locale_dirs": [_beside(file, str(each)) for each in folders]}
    return result


def _data_beside(file: Path, name: str) -> str:
    """Return the data that lies beside the file, or else what it is called at the working directory or on the Hub."""
    path, mark, split = name.partition("::")
    return _beside(file, path) + mark + split if (file.parent / path).exists() else name


def _beside(file: Path, path: str) -> str:
    there = os.path.join(file.parent, path)
    if os.path.isabs(path):
        return path
    short = os.path.relpath(there)
    # Behind a link, `..` leads somewhere else.
    return short if os.path.realpath(short) == os.path.realpath(there) else os.path.abspath(file.parent) + "/" + path
