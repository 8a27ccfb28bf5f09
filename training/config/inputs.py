"""What a stage reads that another stage makes: whether it is there, and if not, which stage makes it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from training.common.errors import UserError
from training.common.paths import RULE
from training.common.run_folder import FINAL_MODEL, IMPORTANCE_FILE
from training.config.recipe import Recipe, Stage, read_stages

_KEYS = ("model", "teacher", "tokenizer", "importance")


class Maker(NamedTuple):
    """The stage that makes something.

    Attributes:
        name: Its name.
        keys: What it was told.
        command: The command line that runs it alone.
    """

    name: str
    keys: Mapping[str, Any]
    command: str


@dataclass(frozen=True)
class Input:
    """One thing that a stage reads.

    Attributes:
        key: The key that names it: ``model``, ``teacher``, ``tokenizer`` or ``importance``.
        name: Its path, or its name on the Hub.
        there: Whether it is on this machine.
        maker: The stage that makes it, if it is not there and there is one.
        on_hub: Whether it is not there, no stage makes it, and its name may be one of the Hub.
    """

    key: str
    name: str
    there: bool
    maker: Maker | None = None
    on_hub: bool = False

    @property
    def missing(self) -> bool:
        """Whether it has to be made before the stage can run."""
        return not self.there and not self.on_hub

    def described(self) -> str:
        """Its name and where it comes from, for people."""
        if self.there:
            return f"{self.name}, there"
        if self.maker is not None:
            return f"{self.name}, made by stage {self.maker.name}"
        return f"{self.name}, {'on the Hub' if self.on_hub else 'missing: no stage makes it'}"


def find_inputs(recipe: Recipe, stage: Stage) -> list[Input]:
    """What a stage reads, looked for on disk, then among the stages of its recipe and of the recipes beside it."""
    named = {key: getattr(stage.arguments, key) for key in _KEYS}
    if named["tokenizer"] == "train":
        named["tokenizer"] = None
    return [_find(recipe, stage, key, str(name)) for key, name in named.items() if name is not None]


def _find(recipe: Recipe, stage: Stage, key: str, name: str) -> Input:
    path = _path_of(key, name)
    if path.exists():
        return Input(key, name, there=True)
    maker = next(_makers(recipe, stage, path), None)
    return Input(key, name, there=False, maker=maker, on_hub=maker is None and key != "importance" and _on_hub(name))


def _path_of(key: str, name: str) -> Path:
    """What must be there; the file of an importance that is named by its folder."""
    path = Path(name)
    return path / IMPORTANCE_FILE if key == "importance" and path.suffix != Path(IMPORTANCE_FILE).suffix else path


def _on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _makers(recipe: Recipe, stage: Stage, path: Path) -> Iterator[Maker]:
    """The stages that make a path: those of the recipe, then those of the files beside it, recipes of one stage first.

    A file beside it is a recipe if it can be read as one; what else is wrong with it shows when it is run.
    """
    own = {each.name: each.keys for each in recipe.stages if each.name != stage.name}
    for name, keys in own.items():
        if _makes(keys, path):
            yield Maker(name, keys, _command(recipe.path, name, recipe.overrides))
    beside = {file: _stages_in(file) for file in sorted(recipe.path.parent.glob("*.y*ml")) if file != recipe.path}
    for file, stages in sorted(beside.items(), key=lambda item: len(item[1])):
        for name, keys in stages.items():
            if _makes(keys, path):
                yield Maker(name, keys, _command(file, None if len(stages) == 1 else name, {}))


def _stages_in(file: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_stages(file, {})[1]
    except UserError:
        return {}


def _makes(keys: Mapping[str, Any], path: Path) -> bool:
    output_dir = Path(str(keys["output_dir"]))
    prunes = keys.get("prune_to") is not None and keys.get("importance") is None
    return path == output_dir / FINAL_MODEL or (prunes and path == output_dir / IMPORTANCE_FILE)


def _command(recipe: Path, stage: str | None, overrides: Mapping[str, Any]) -> str:
    words = ["python", "training/run_stage.py", str(recipe)]
    if stage is not None:
        words += ["--stage", stage]
    for key, value in overrides.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def require_inputs(recipe: Recipe, chosen: Sequence[Stage], finished: Collection[str] = ()) -> None:
    """Makes sure that every stage to be run finds what it reads, or that an earlier one of them makes it.

    Args:
        recipe: The recipe.
        chosen: The stages to be run, in order.
        finished: Names of those that are finished and read nothing any more.

    Raises:
        UserError: If something is missing; the message names the stage that makes it and its command, if there is one.
    """
    made: list[Mapping[str, Any]] = []
    for stage in chosen:
        for each in find_inputs(recipe, stage) if stage.name not in finished else []:
            if each.missing and not any(_makes(keys, _path_of(each.key, each.name)) for keys in made):
                raise missing_error(recipe, stage, each)
        made.append(stage.keys)


def missing_error(recipe: Recipe, stage: Stage, missing: Input) -> UserError:
    """The error for something that a stage reads and that is not there, with the command that makes it."""
    what = f"{recipe.path}: stage {stage.name!r}: {missing.key} {missing.name!r} is missing"
    if missing.maker is None:
        return UserError(f"{what}, and no stage here or in a recipe beside it makes it; check the path ({RULE})")
    return UserError(f"{what}; stage {missing.maker.name!r} makes it: {missing.maker.command}")
