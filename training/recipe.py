"""Recipes: YAML files that say what to train, and command lines that change them.

A recipe is a mapping of the keys of :class:`~training.arguments.StageArguments`, with two more:

- ``extends: other.yaml`` starts from another recipe, whose keys it may replace;
- ``stages`` names several stages in order, each a mapping of keys. The other keys are shared by all of them; each stage
  writes to ``OUTPUT_DIR/<stage>``, and ``model: <stage>`` starts from what an earlier one made; so do ``teacher``,
  ``tokenizer`` and ``importance``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from training.arguments import StageArguments
from training.errors import UserError
from training.yaml_file import load_yaml, unknown_key

__all__ = ["FINAL_MODEL", "Recipe", "Stage", "command_line_overrides", "load_recipe", "recipe_help"]

# Name of the folder, below a stage's output, that holds its finished model.
FINAL_MODEL = "model"
# Keys that may name an earlier stage, and what of its folder they then mean.
_MADE_BY_STAGES = {"model": FINAL_MODEL, "teacher": FINAL_MODEL, "tokenizer": FINAL_MODEL, "importance": ""}
# Every key with its type, as written.
_STAGE_KEYS = {field.name: str(field.type) for field in fields(StageArguments) if field.init}


@dataclass(frozen=True)
class Stage:
    """One stage: its name, what it was told (``keys``) and what that means (``arguments``)."""

    name: str
    keys: dict[str, Any]
    arguments: StageArguments


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run, and the folder below which all of them write."""

    path: Path
    stages: list[Stage]
    output_dir: Path


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def recipe_help() -> str:
    """Describes every key of a recipe."""
    parser = _Parser(StageArguments, prog="run_stage.py", add_help=False, allow_abbrev=False)
    return parser.format_help()


def load_recipe(path: Path | str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Reads a recipe and checks all of it before anything runs.

    Args:
        path: The YAML file.
        overrides: Keys that replace those of the recipe, in every stage.

    Raises:
        UserError: If the file or a file that it extends is missing or faulty, or a key is unknown or has a wrong value.
    """
    path = Path(path)
    keys = _read(path)
    stages = keys.pop("stages", None)
    overrides = overrides or {}
    if stages is None:
        stage = _stage(path, path.stem, {**keys, **overrides})
        return Recipe(path, [stage], Path(stage.arguments.output_dir))
    _check_stages(path, stages)
    shared = {**keys, **{key: value for key, value in overrides.items() if key == "output_dir"}}
    for key in ("output_dir", *_MADE_BY_STAGES):
        if isinstance(shared.get(key), list) or isinstance(overrides.get(key), list):
            raise UserError(f"{path}: key {key!r} takes one value, got {overrides.get(key, shared.get(key))!r}")
    output_dir = Path(str(shared.get("output_dir") or _missing(path, "output_dir")))
    result: list[Stage] = []
    for name, own in stages.items():
        stage_keys = {**shared, "output_dir": str(output_dir / name), **own}
        stage_keys |= {key: value for key, value in overrides.items() if key != "output_dir"}
        for key, part in _MADE_BY_STAGES.items():
            # `tokenizer: train` trains one, whatever the stages are called.
            if stage_keys.get(key) in stages and (key, stage_keys[key]) != ("tokenizer", "train"):
                stage_keys[key] = str(_folder_of(path, name, key, stage_keys[key], result) / part)
        result.append(_stage(path, name, stage_keys))
    return Recipe(path, result, output_dir)


def _check_stages(path: Path, stages: Any) -> None:
    if not isinstance(stages, dict) or not stages or not all(isinstance(keys, dict) for keys in stages.values()):
        raise UserError(f"{path}: key 'stages' must map names of stages to their keys")
    for name, keys in stages.items():
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise UserError(f"{path}: stage {name!r}: the name becomes a folder; use letters, put numbers in quotes")
        for key in _MADE_BY_STAGES:
            if not isinstance(keys.get(key), str | None):
                raise UserError(f"{path}: stage {name!r}: key {key!r} cannot be {keys[key]!r}; name one")


def _folder_of(path: Path, stage: str, key: str, name: str, earlier: Sequence[Stage]) -> Path:
    """The folder that an earlier stage writes to."""
    for made in earlier:
        if made.name == name:
            return Path(made.arguments.output_dir)
    raise UserError(f"{path}: stage {stage!r}: {key} {name!r} comes from a stage that has not run; put it before")


def _missing(path: Path, key: str) -> NoReturn:
    raise UserError(f"{path}: key {key!r} is missing; add it")


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a recipe file with what it extends."""
    if path.resolve() in seen:
        raise UserError(f"{path}: the recipe extends itself; take out one 'extends'")
    keys = load_yaml(path)
    base = keys.pop("extends", None)
    known = [*_STAGE_KEYS, "stages", "extends"]
    for owner in (keys, *(stage for stage in _stages_of(keys) if isinstance(stage, dict))):
        for key in owner:
            if key not in known:
                raise unknown_key(str(path), key, known)
    if base is None:
        return keys
    return {**_read(path.parent / str(base), (*seen, path.resolve())), **keys}


def _stages_of(keys: dict[str, Any]) -> Iterable[Any]:
    stages = keys.get("stages")
    return stages.values() if isinstance(stages, dict) else ()


def _stage(path: Path, name: str, keys: dict[str, Any]) -> Stage:
    where = f"{path}: stage {name!r}"
    keys = {key: value for key, value in keys.items() if value is not None}
    if "output_dir" not in keys:
        _missing(path, "output_dir")
    parser = _Parser(StageArguments, allow_abbrev=False)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(_as_command_line(keys), look_for_args_file=False)
    except (UserError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    return Stage(name, keys, arguments)


def _as_command_line(keys: dict[str, Any]) -> list[str]:
    """Values as words: argparse then converts and checks those of a file and of a command line alike."""
    words = []
    for key, value in keys.items():
        if isinstance(value, list):
            if "list" not in _STAGE_KEYS[key]:
                raise UserError(f"key {key!r} takes one value, got {value!r}")
            words += [f"--{key}", *(str(item) for item in value)]
        else:
            text = json.dumps(value) if isinstance(value, dict | bool) else str(value)
            words.append(f"--{key}={text}")
    return words


def command_line_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Reads ``--key value …`` and ``--key=value`` words; a key without a value means true.

    Raises:
        UserError: If a word belongs to no key or a key is unknown.
    """
    overrides: dict[str, Any] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key not in _STAGE_KEYS:
                raise unknown_key("command line", key, sorted(_STAGE_KEYS))
            values = [value] if equals else []
            overrides[key] = values
        elif not overrides:
            raise UserError(f"command line: {word!r} belongs to no key; write --key value")
        else:
            values.append(word)
    return {key: _single(values) for key, values in overrides.items()}


def _single(values: list[str]) -> Any:
    if not values:
        return True
    return values[0] if len(values) == 1 else values
