"""Recipes: YAML files that say what to train, command lines that change them, and what their stages read.

A recipe maps keys of :class:`~training.config.arguments.StageArguments` to values. ``extends`` names another recipe,
and ``stages`` maps names to the keys of stages, which run in order: training/config/README.md describes both.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import HfArgumentParser

from training.common.errors import UserError
from training.common.hub import may_be_on_hub
from training.common.run_folder import FINAL_MODEL, IMPORTANCE_FILE
from training.common.yaml_file import RULE, load_yaml, unknown_key, with_paths, written_by
from training.config.arguments import StageArguments, check_given

# Keys that may name an earlier stage, and what of its folder they then mean.
_MADE_BY_STAGES = {
    **dict.fromkeys(("model", "teacher", "tokenizer", "miner"), FINAL_MODEL),
    **{"importance": "", "prepared_dir": "prepared"},
}
# Every key with its type, as written.
_STAGE_KEYS = {each.name: str(each.type) for each in fields(StageArguments) if each.init}
# Declared as texts, but may be true.
_MAY_BE_TRUE = ("fsdp", "include_num_input_tokens_seen")


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
    output_dir, stages = _read_stages(path, overrides)
    return Recipe(path, [_stage(path, name, keys) for name, keys in stages.items()], output_dir, overrides)


def _read_stages(path: Path, overrides: dict[str, Any]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Return the folder that a recipe writes to and the keys of each stage, whose values are not checked yet."""
    keys = _read(path, _Context())
    stages = keys.pop("stages", None)
    if stages is None:
        only = {**keys, **overrides}
        return _output_dir(path, only), {path.stem: only}
    overrides = dict(overrides)
    output_dir = _output_dir(path, {**keys, "output_dir": overrides.pop("output_dir", keys.get("output_dir"))})
    result: dict[str, dict[str, Any]] = {}
    for name, own in stages.items():
        result[name] = {**keys, "output_dir": str(output_dir / name), **own, **overrides}
        for key, part in _MADE_BY_STAGES.items():
            value = result[name].get(key)
            if isinstance(value, list | dict):
                raise UserError(f"{path}: stage {name!r}: key {key!r} takes one value, got {value!r}")
            # `tokenizer: train` trains one, even if a stage is called so.
            if value not in stages or (key, value) == ("tokenizer", "train"):
                continue
            if value == name or value not in result:
                raise UserError(f"{path}: stage {name!r}: stage {value!r}, named as {key}, has not run; put it before")
            result[name][key] = str(Path(str(result[value]["output_dir"])) / part)
    return output_dir, result


def _output_dir(path: Path, keys: Mapping[str, Any]) -> Path:
    value = keys.get("output_dir")
    if not value or isinstance(value, list | dict):
        fault = f"takes one value, got {value!r}" if value else "is missing; add it"
        raise UserError(f"{path}: key 'output_dir' {fault}")
    return Path(str(value))


class _Context(NamedTuple):
    """What the files and keys around those that are read say of paths."""

    files: frozenset[Path] = frozenset()  # that lead here by 'extends'
    stages: frozenset[str] = frozenset()  # names that are no paths
    written: frozenset[str] = frozenset()  # folders that the recipe writes to

    def within(self, keys: Mapping[str, Any]) -> _Context:
        """Return the context of keys that stand within these."""
        return self._replace(stages=self.stages | {*keys.get("stages", ())}, written=self.written | written_by(keys))


def _read(path: Path, context: _Context) -> dict[str, Any]:
    """Read a recipe file with what it and its stages extend."""
    if path.resolve() in context.files:
        raise UserError(f"{path}: the recipe extends itself; take out one 'extends'")
    return _extended(path, load_yaml(path), context._replace(files=context.files | {path.resolve()}))


def _extended(path: Path, keys: dict[str, Any], context: _Context, name: str | None = None) -> dict[str, Any]:
    """Return the keys of a file, or of its stage ``name``, over those of the recipe that they extend."""
    known = [*_STAGE_KEYS, "extends", *(["stages"] if name is None else [])]
    for key in keys:
        if key not in known:
            raise unknown_key(str(path), key, known)
    if name is None and "stages" in keys:
        _check_stages(path, keys["stages"])
    context = context.within(keys)
    base = {} if keys.get("extends") is None else _read(path.parent / str(keys["extends"]), context)
    if name is not None:
        if "stages" in base:
            raise UserError(f"{path}: stage {name!r} extends {keys['extends']}, which has stages; name a recipe of one")
        base.pop("output_dir", None)
    context = context.within(base)
    own = {key: value for key, value in keys.items() if key not in ("extends", "stages")}
    # Here, not where stages are made: the paths are relative to the file in which they stand.
    result = {**base, **with_paths(path, own, context.stages, context.written)}
    if "stages" in keys:
        result["stages"] = {stage: _extended(path, of, context, stage) for stage, of in keys["stages"].items()}
    return result


def _check_stages(path: Path, stages: Any) -> None:
    if not isinstance(stages, dict) or not stages or not all(isinstance(keys, dict) for keys in stages.values()):
        raise UserError(f"{path}: key 'stages' must map names of stages to their keys")
    for name in stages:
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise UserError(f"{path}: stage {name!r}: the name becomes a folder; use letters, put numbers in quotes")


def _stage(path: Path, name: str, keys: dict[str, Any]) -> Stage:
    keys = {key: value for key, value in keys.items() if value is not None}
    _output_dir(path, keys)
    try:
        check_given(keys)
        (arguments,) = _parser().parse_args_into_dataclasses(_as_words(keys), look_for_args_file=False)
    # A configuration that is a file may be missing.
    except (UserError, ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"{path}: stage {name!r}: {' '.join(str(error).split())}") from None
    # Whoever reads the keys of a run finds its data.
    return Stage(name, {**keys, **({"manifest": arguments.manifest} if arguments.data else {})}, arguments)


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
        if not isinstance(value, list):
            words.append(f"--{key}={_word(key, value)}")
        elif "list" in _STAGE_KEYS[key]:
            words += [f"--{key}", *(_word(key, each) for each in value)]
        else:
            raise UserError(f"key {key!r} takes one value, got {value!r}")
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
                raise unknown_key("command line", key, sorted(_STAGE_KEYS))
            given[key] = [value] if equals else []
        elif key is None:
            raise UserError(f"command line: {word!r} belongs to no key; write --key value")
        else:
            given[key].append(word)
    for key, values in given.items():
        if not values and "bool" not in _STAGE_KEYS[key] and key not in _MAY_BE_TRUE:
            raise UserError(f"command line: --{key} has no value; write --{key} VALUE")
    return {key: values if len(values) > 1 else values[0] if values else True for key, values in given.items()}


class Maker(NamedTuple):
    """The stage that makes an input: its name, its keys, and the command line that runs it alone."""

    name: str
    keys: Mapping[str, Any]
    command: str


class Input(NamedTuple):
    """One thing that a stage reads: a path or a name on the Hub, given as ``key``."""

    key: str
    name: str
    there: bool  # on this machine
    maker: Maker | None = None  # the stage that makes it, if it is not there and such a stage is known
    on_hub: bool = False  # not there, no stage makes it, and its name may be one of the Hub

    @property
    def missing(self) -> bool:
        """Whether it has to be made before the stage can run."""
        return not self.there and not self.on_hub

    def described(self) -> str:
        """Describe where it comes from."""
        made = "missing: no stage makes it" if self.maker is None else f"made by stage {self.maker.name}"
        return f"{self.name}, {'there' if self.there else 'on the Hub' if self.on_hub else made}"


def find_inputs(recipe: Recipe, stage: Stage) -> list[Input]:
    """Look for what a stage reads: on disk, then among the stages of its recipe and of the recipes beside it."""
    found = []
    for key in ("model", "teacher", "tokenizer", "importance", "miner", "reranker"):
        name = getattr(stage.arguments, key)
        if (
            name is None
            or (key, name) == ("tokenizer", "train")
            or (key == "teacher" and not stage.arguments.needs_teacher)
        ):
            continue
        path = _path_of(key, name)
        maker = None if path.exists() else next(_makers(recipe, stage, path), None)
        elsewhere = not path.exists() and maker is None and key != "importance"
        found.append(Input(key, name, path.exists(), maker, elsewhere and may_be_on_hub(name)))
    return found


def _path_of(key: str, name: str) -> Path:
    """Return what must exist; the file of a measurement that is named by its folder."""
    path = Path(name)
    return path / IMPORTANCE_FILE if key == "importance" and path.suffix != Path(IMPORTANCE_FILE).suffix else path


def _makers(recipe: Recipe, stage: Stage, path: Path) -> Iterator[Maker]:
    """Yield the stages that make a path: those of the recipe, then those of the files beside it."""
    own = {each.name: each.keys for each in recipe.stages if each.name != stage.name}
    for file in [recipe.path, *sorted({*recipe.path.parent.glob("*.y*ml")} - {recipe.path})]:
        is_own = file == recipe.path
        # A file beside it is a recipe if it can be read as one; other faults in it show when it is run.
        with suppress(UserError):
            for name, keys in (own if is_own else _read_stages(file, {})[1]).items():
                if _makes(keys, path):
                    words = ["python", "training/run_stage.py", str(file), "--stage", name]
                    for key, value in recipe.overrides.items() if is_own else ():
                        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
                    yield Maker(name, keys, shlex.join(words))


def _makes(keys: Mapping[str, Any], path: Path) -> bool:
    output_dir = Path(str(keys["output_dir"]))
    measures = keys.get("prune_to") is not None and keys.get("importance") is None
    return path == output_dir / FINAL_MODEL or (measures and path == output_dir / IMPORTANCE_FILE)


def require_inputs(recipe: Recipe, chosen: Sequence[Stage], finished: Collection[str] = ()) -> None:
    """Refuse stages that lack something they read and that no earlier one of them makes; finished ones read nothing."""
    made: list[Mapping[str, Any]] = []
    for stage in chosen:
        for each in find_inputs(recipe, stage) if stage.name not in finished else []:
            if each.missing and not any(_makes(keys, _path_of(each.key, each.name)) for keys in made):
                raise missing_error(recipe, stage, each)
        made.append(stage.keys)


def missing_error(recipe: Recipe, stage: Stage, missing: Input) -> UserError:
    """Return the error for a missing input, with the command that makes it."""
    what = f"{recipe.path}: stage {stage.name!r}: {missing.key} {missing.name!r} is missing"
    if missing.maker is None:
        return UserError(f"{what}, and no stage here or in a recipe beside it makes it; check the path ({RULE})")
    return UserError(f"{what}; stage {missing.maker.name!r} makes it: {missing.maker.command}")
