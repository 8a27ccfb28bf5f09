"""Recipes: YAML files that say what to train, and command lines that change them.

A recipe is a mapping of the keys of :class:`~training.config.arguments.StageArguments`, with two more:

- ``extends: other.yaml`` starts from another recipe, whose keys it may replace;
- ``stages`` names several stages in order, each a mapping of keys. The other keys are shared by all of them; each stage
  writes to ``OUTPUT_DIR/<stage>``, and ``model: <stage>`` starts from what an earlier one made; so do ``teacher``,
  ``tokenizer``, ``importance`` and ``prepared_dir``. A stage may also extend a recipe of one stage: it takes all keys
  of it but ``output_dir``.

:mod:`training.common.yaml_file` says where relative paths start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from training.common.errors import UserError
from training.common.run_folder import FINAL_MODEL
from training.common.yaml_file import in_file, load_yaml, placed, unknown_key
from training.config.arguments import StageArguments
from training.config.stage_keys import check_given

# Keys that may name an earlier stage, and what of its folder they then mean.
_MADE_BY_STAGES = {
    **dict.fromkeys(("model", "teacher", "tokenizer"), FINAL_MODEL),
    **{"importance": "", "prepared_dir": "prepared"},
}
# Every key with its type, as written.
_STAGE_KEYS = {each.name: str(each.type) for each in fields(StageArguments) if each.init}
# Declared as texts, but may be true.
_MAY_BE_TRUE = ("fsdp", "include_num_input_tokens_seen")
# What other programs call the keys.
_MEANT = {
    **{"lr": "learning_rate", "batch_size": "global_batch_size", "epochs": "num_train_epochs", "steps": "max_steps"},
    **{"data": "manifest", "dataset": "manifest", "model_name_or_path": "model", "max_seq_length": "max_length"},
    **{"num_hard_negatives": "num_hard_negatives_retrieval", "lora_r": "lora_rank", "optimizer": "optim"},
}


@dataclass(frozen=True)
class Stage:
    """One stage: its name, the keys that it was given, and the arguments that follow from them."""

    name: str
    keys: dict[str, Any]
    arguments: StageArguments


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run, the folder that all of them write to, and what replaced their keys."""

    path: Path
    stages: list[Stage]
    output_dir: Path
    overrides: dict[str, Any] = field(default_factory=dict)


def made_by(stage: Stage) -> str:
    """Return the folder of the model that a stage makes, as later stages name it."""
    return str(Path(stage.arguments.output_dir) / FINAL_MODEL)


class _Parser(HfArgumentParser):
    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add an argument without the part of a field's metadata that argparse does not know."""
        options.pop("rules", None)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@cache
def _parser() -> _Parser:
    return _Parser(StageArguments, prog="run_stage.py", add_help=False, allow_abbrev=False)


def recipe_help() -> str:
    """Describe every key of a recipe."""
    return _parser().format_help()


def load_recipe(path: Path | str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and check all of it before anything runs; ``overrides`` replace keys in every stage."""
    path, overrides = Path(path), overrides or {}
    output_dir, stages = read_stages(path, overrides)
    return Recipe(path, [_stage(path, name, keys) for name, keys in stages.items()], output_dir, overrides)


def read_stages(path: Path, overrides: dict[str, Any]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Return the folder that a recipe writes to and the keys of each stage, whose values are not checked yet."""
    keys = _read(path)
    stages = keys.pop("stages", None)
    if stages is None:
        only = placed({**keys, **overrides}, keys.get("output_dir"))
        return _output_dir(path, only), {path.stem: only}
    _check_stages(path, stages)
    shared = {**keys, **{key: value for key, value in overrides.items() if key == "output_dir"}}
    for key in ("output_dir", *_MADE_BY_STAGES):
        if isinstance(value := overrides.get(key, shared.get(key)), list):
            raise UserError(f"{path}: key {key!r} takes one value, got {value!r}")
    output_dir = _output_dir(path, shared)
    result: dict[str, dict[str, Any]] = {}
    for name, own in stages.items():
        stage_keys = {**shared, "output_dir": str(output_dir / name), **own}
        stage_keys |= {key: value for key, value in overrides.items() if key != "output_dir"}
        for key, part in _MADE_BY_STAGES.items():
            value = stage_keys.get(key)
            # `tokenizer: train` trains one, even if a stage is called so.
            if value not in stages or (key, value) == ("tokenizer", "train"):
                continue
            if value not in result:
                raise UserError(f"{path}: stage {name!r}: stage {value!r}, named as {key}, has not run; put it before")
            stage_keys[key] = str(Path(str(result[value]["output_dir"])) / part)
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


def _output_dir(path: Path, keys: dict[str, Any]) -> Path:
    if not keys.get("output_dir"):
        raise UserError(f"{path}: key 'output_dir' is missing; add it")
    return Path(str(keys["output_dir"]))


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file with what it and its stages extend."""
    if path.resolve() in seen:
        raise UserError(f"{path}: the recipe extends itself; take out one 'extends'")
    keys, seen = load_yaml(path, named_in_file=bool(seen)), (*seen, path.resolve())
    _check_known(path, keys, "stages", "extends")
    if isinstance(stages := keys.get("stages"), dict):
        # Here, not where stages are made: the paths are relative to the file in which they stand.
        own = {name: stage for name, stage in stages.items() if isinstance(stage, dict)}
        keys["stages"] = stages | {name: _read_stage(path, name, stage, seen) for name, stage in own.items()}
    base, keys = keys.pop("extends", None), in_file(path, keys)
    return keys if base is None else {**_read(path.parent / str(base), seen), **keys}


def _read_stage(path: Path, name: Any, keys: dict[str, Any], seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return a stage's keys after those of the recipe that it extends."""
    _check_known(path, keys, "extends")
    extended, keys = keys.get("extends"), in_file(path, {key: own for key, own in keys.items() if key != "extends"})
    if extended is None:
        return keys
    base = _read(path.parent / str(extended), seen)
    if "stages" in base:
        raise UserError(f"{path}: stage {name!r} extends {extended}, which has stages; extend a recipe of one")
    base.pop("output_dir", None)
    return {**base, **keys}


def _check_known(path: Path, keys: dict[str, Any], *more: str) -> None:
    for key in keys:
        if key not in _STAGE_KEYS and key not in more:
            raise unknown_key(str(path), key, [*_STAGE_KEYS, *more], _MEANT)


def _stage(path: Path, name: str, keys: dict[str, Any]) -> Stage:
    keys = {key: value for key, value in keys.items() if value is not None}
    _output_dir(path, keys)
    try:
        check_given(keys)
        (arguments,) = _parser().parse_args_into_dataclasses(_as_words(keys), look_for_args_file=False)
    # A configuration that is a file may be missing.
    except (UserError, ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"{path}: stage {name!r}: {' '.join(str(error).split())}") from None
    return Stage(name, keys, arguments)


def read_values(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every key, given or not, in one spelling: `2e-5` is `0.00002`, JSON the mapping it means."""
    values = vars(_parser().parse_args(_as_words(keys)))
    texts = {key: value for key, value in values.items() if isinstance(value, str) and value.startswith("{")}
    return {**values, **{key: json.loads(text) for key, text in texts.items()}}


def _as_words(keys: Mapping[str, Any]) -> list[str]:
    """Return keys as words: argparse then converts those of a file and of a command line in the same way."""
    words = []
    for key, value in keys.items():
        value = "none" if (key, value) == ("report_to", []) else value
        if isinstance(value, list) and "list" not in _STAGE_KEYS[key]:
            raise UserError(f"key {key!r} takes one value, got {value!r}")
        several = isinstance(value, list)
        words += [f"--{key}", *(_word(key, each) for each in value)] if several else [f"--{key}={_word(key, value)}"]
    return words


def _word(key: str, value: Any) -> str:
    # YAML reads `no` and `off` as false.
    if value is False and "Strategy" in _STAGE_KEYS[key]:
        return "no"
    word = json.dumps(value) if isinstance(value, dict | bool) else str(value)
    # `1e3` is a number with a fraction to YAML, and so it is to Python.
    if re.search(r"\bint\b", _STAGE_KEYS[key]):
        with suppress(ValueError, OverflowError):
            word = str(int(float(word))) if float(word).is_integer() and not word.isdecimal() else word
    return word


def command_line_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``--key value …`` and ``--key=value`` words; a key of a truth value means true without one."""
    given: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key not in _STAGE_KEYS:
                raise unknown_key("command line", key, sorted(_STAGE_KEYS), _MEANT)
            given[key] = [value] if equals else []
        elif key is None:
            raise UserError(f"command line: {word!r} belongs to no key; write --key value")
        else:
            given[key].append(word)
    for key, values in given.items():
        if not values and "bool" not in _STAGE_KEYS[key] and key not in _MAY_BE_TRUE:
            raise UserError(f"command line: --{key} has no value; write --{key} VALUE")
    return {key: values if len(values) > 1 else values[0] if values else True for key, values in given.items()}
