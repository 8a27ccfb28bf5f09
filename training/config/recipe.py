"""Recipes: YAML files that say what to train, and command lines that change them.

A recipe is a mapping of the keys of :class:`~training.config.arguments.StageArguments`, with two more:

- ``extends: other.yaml`` starts from another recipe, whose keys it may replace;
- ``stages`` names several stages in order, each a mapping of keys. The other keys are shared by all of them; each stage
  writes to ``OUTPUT_DIR/<stage>``, and ``model: <stage>`` starts from what an earlier one made; so do ``teacher``,
  ``tokenizer``, ``importance`` and ``prepared_dir``. A stage may extend a recipe of one stage, too: it takes all keys
  of it but ``output_dir``, which says where that recipe writes when it runs by itself.

Where its relative paths start is told in :mod:`training.common.paths`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from training.common.errors import UserError
from training.common.paths import in_file, placed
from training.common.run_folder import FINAL_MODEL
from training.common.yaml_file import load_yaml, unknown_key
from training.config.arguments import StageArguments
from training.config.stage_keys import check_given

# Keys that may name an earlier stage, and what of its folder they then mean.
_MADE_BY_STAGES = {
    **{"model": FINAL_MODEL, "teacher": FINAL_MODEL, "tokenizer": FINAL_MODEL},
    **{"importance": "", "prepared_dir": "prepared"},
}
# Types of integers, and how else an integer may be written.
_INTEGER = re.compile(r"\bint\b")
_AS_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
# Every key with its type, as written.
_STAGE_KEYS = {field.name: str(field.type) for field in fields(StageArguments) if field.init}
# Declared as texts, but true as well.
_MAY_BE_TRUE = ("fsdp", "include_num_input_tokens_seen")
# What other programs call keys.
_MEANT = {
    **dict.fromkeys(("lr", "base_lr"), "learning_rate"),
    **dict.fromkeys(("batch_size", "bs", "train_batch_size", "per_device_batch_size"), "global_batch_size"),
    **dict.fromkeys(("epochs", "num_epochs", "train_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "num_steps"), "max_steps"),
    **dict.fromkeys(("output", "out", "out_dir"), "output_dir"),
    **dict.fromkeys(("data", "dataset", "train_file"), "manifest"),
    **dict.fromkeys(("base_model", "model_name", "model_name_or_path"), "model"),
    **dict.fromkeys(("max_len", "max_seq_length", "max_seq_len", "seq_length"), "max_length"),
    **dict.fromkeys(("negatives", "num_negatives", "num_hard_negatives"), "num_hard_negatives_retrieval"),
    **dict.fromkeys(("rank", "lora_r"), "lora_rank"),
    **{"wd": "weight_decay", "warmup": "warmup_steps", "scheduler": "lr_scheduler_type", "optimizer": "optim"},
    **{"clip": "max_grad_norm", "tau": "temperature", "dims": "matryoshka_dimensions", "prompt": "query_instruction"},
}


@dataclass(frozen=True)
class Stage:
    """One stage: its name, what it was told (``keys``) and what that means (``arguments``)."""

    name: str
    keys: dict[str, Any]
    arguments: StageArguments


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run, the folder below which all of them write, and what replaced their keys."""

    path: Path
    stages: list[Stage]
    output_dir: Path
    overrides: dict[str, Any] = field(default_factory=dict)


def made_by(stage: Stage) -> str:
    """The folder of the model that a stage makes, as later stages name it."""
    return str(Path(stage.arguments.output_dir) / FINAL_MODEL)


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
    path, overrides = Path(path), overrides or {}
    output_dir, stages = read_stages(path, overrides)
    return Recipe(path, [_stage(path, name, keys) for name, keys in stages.items()], output_dir, overrides)


def read_stages(path: Path, overrides: dict[str, Any]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder below which a recipe writes, and what each stage was told, by name; values are not checked yet.

    Raises:
        UserError: If the file or a file that it extends is missing or faulty, or a key is unknown.
    """
    keys = _read(path)
    stages = keys.pop("stages", None)
    if stages is None:
        only = placed({**keys, **overrides}, keys.get("output_dir"))
        return Path(str(only.get("output_dir") or _missing(path, "output_dir"))), {path.stem: only}
    _check_stages(path, stages)
    shared = {**keys, **{key: value for key, value in overrides.items() if key == "output_dir"}}
    for key in ("output_dir", *_MADE_BY_STAGES):
        if isinstance(shared.get(key), list) or isinstance(overrides.get(key), list):
            raise UserError(f"{path}: key {key!r} takes one value, got {overrides.get(key, shared.get(key))!r}")
    output_dir = Path(str(shared.get("output_dir") or _missing(path, "output_dir")))
    result: dict[str, dict[str, Any]] = {}
    for name, own in stages.items():
        stage_keys = {**shared, "output_dir": str(output_dir / name), **own}
        stage_keys |= {key: value for key, value in overrides.items() if key != "output_dir"}
        for key, part in _MADE_BY_STAGES.items():
            # `tokenizer: train` trains one, whatever the stages are called.
            if stage_keys.get(key) in stages and (key, stage_keys[key]) != ("tokenizer", "train"):
                stage_keys[key] = str(_folder_of(path, name, key, stage_keys[key], result) / part)
        result[name] = placed(stage_keys, keys.get("output_dir"))
    return output_dir, result


def _check_stages(path: Path, stages: Any) -> None:
    if not isinstance(stages, dict) or not stages or not all(isinstance(keys, dict) for keys in stages.values()):
        raise UserError(f"{path}: key 'stages' must map names of stages to their keys")
    for name, keys in stages.items():
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise UserError(f"{path}: stage {name!r}: the name becomes a folder; use letters, put numbers in quotes")
        for key in _MADE_BY_STAGES:
            if not isinstance(keys.get(key), str | None):
                raise UserError(f"{path}: stage {name!r}: key {key!r} cannot be {keys[key]!r}; name one")


def _folder_of(path: Path, stage: str, key: str, name: str, earlier: dict[str, dict[str, Any]]) -> Path:
    """The folder that an earlier stage writes to."""
    if name not in earlier:
        raise UserError(f"{path}: stage {stage!r}: {key} {name!r} comes from a stage that has not run; put it before")
    return Path(str(earlier[name]["output_dir"]))


def _missing(path: Path, key: str) -> NoReturn:
    raise UserError(f"{path}: key {key!r} is missing; add it")


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a recipe file with what it and its stages extend."""
    # Of links in a circle it is the path itself, whose error follows.
    real = Path(os.path.realpath(path))
    if real in seen:
        raise UserError(f"{path}: the recipe extends itself; take out one 'extends'")
    seen = (*seen, real)
    keys = load_yaml(path, named_in_file=len(seen) > 1)
    _check_known(path, keys, [*_STAGE_KEYS, "stages", "extends"])
    if isinstance(stages := keys.get("stages"), dict):
        # Here, not where stages are made: the paths are relative to the file in which they stand.
        keys["stages"] = {name: _read_stage(path, name, own, seen) for name, own in stages.items()}
    base, keys = keys.pop("extends", None), in_file(path, keys)
    return keys if base is None else {**_read(path.parent / str(base), seen), **keys}


def _read_stage(path: Path, name: Any, keys: Any, seen: tuple[Path, ...]) -> Any:
    """A stage's keys after those of the recipe that it extends, if they are keys at all."""
    if not isinstance(keys, dict):
        return keys
    _check_known(path, keys, [*_STAGE_KEYS, "extends"])
    extended, keys = keys.get("extends"), in_file(path, {key: own for key, own in keys.items() if key != "extends"})
    if extended is None:
        return keys
    try:
        base = _read(path.parent / str(extended), seen)
    except UserError as error:
        raise UserError(f"{path}: stage {name!r}: {error}") from None
    if "stages" in base:
        raise UserError(f"{path}: stage {name!r} extends {extended}, which has stages; extend a recipe of one")
    base.pop("output_dir", None)
    return {**base, **keys}


def _check_known(path: Path, keys: dict[str, Any], known: list[str]) -> None:
    for key in keys:
        if key not in known:
            raise unknown_key(str(path), key, known, _MEANT)


def _stage(path: Path, name: str, keys: dict[str, Any]) -> Stage:
    where = f"{path}: stage {name!r}"
    keys = {key: value for key, value in keys.items() if value is not None}
    if "output_dir" not in keys:
        _missing(path, "output_dir")
    parser = _Parser(StageArguments, allow_abbrev=False)
    try:
        check_given(keys)
        (arguments,) = parser.parse_args_into_dataclasses(_as_command_line(keys), look_for_args_file=False)
    # A configuration that is a file may be missing.
    except (UserError, ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    return Stage(name, keys, arguments)


def _as_command_line(keys: dict[str, Any]) -> list[str]:
    """Values as words: argparse then converts and checks those of a file and of a command line in the same way."""
    words = []
    for key, value in keys.items():
        if isinstance(value, list) and "list" not in _STAGE_KEYS[key]:
            raise UserError(f"key {key!r} takes one value, got {value!r}")
        if key == "report_to" and value == []:
            value = "none"
        if isinstance(value, list):
            words += [f"--{key}", *(_word(key, item) for item in value)]
        else:
            words.append(f"--{key}={_word(key, value)}")
    return words


def _word(key: str, value: Any) -> str:
    """One value as argparse takes it for a key."""
    # YAML reads `no` and `off` as false.
    if value is False and "Strategy" in _STAGE_KEYS[key]:
        return "no"
    word = json.dumps(value) if isinstance(value, dict | bool) else str(value)
    # `1e3` is a number with a fraction to YAML, and so it is to Python.
    if _INTEGER.search(_STAGE_KEYS[key]) and _AS_FLOAT.fullmatch(word) and float(word).is_integer():
        return str(int(float(word)))
    return word


def command_line_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Reads ``--key value …`` and ``--key=value`` words; a key of a truth value means true without one.

    Raises:
        UserError: If a word belongs to no key, or a key is unknown or lacks its value.
    """
    overrides: dict[str, Any] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key not in _STAGE_KEYS:
                raise unknown_key("command line", key, sorted(_STAGE_KEYS), _MEANT)
            values = [value] if equals else []
            overrides[key] = values
        elif not overrides:
            raise UserError(f"command line: {word!r} belongs to no key; write --key value")
        else:
            values.append(word)
    return {key: _single(key, values) for key, values in overrides.items()}


def _single(key: str, values: list[str]) -> Any:
    if values:
        return values[0] if len(values) == 1 else values
    if "bool" not in _STAGE_KEYS[key] and key not in _MAY_BE_TRUE:
        raise UserError(f"command line: --{key} has no value; write --{key} VALUE")
    return True
