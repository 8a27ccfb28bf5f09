"""What a stage reads that another stage makes: whether it exists, and if not, which stage makes it."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from training.common.errors import UserError
from training.common.run_folder import FINAL_MODEL, IMPORTANCE_FILE
from training.common.yaml_file import RULE
from training.config.recipe import Recipe, Stage, read_stages


class Maker(NamedTuple):
    """The stage that makes an input: its name, its keys, and the command line that runs it alone."""

    name: str
    keys: Mapping[str, Any]
    command: str


@dataclass(frozen=True)
class Input:
    """One thing that a stage reads: a path or a name on the Hub, given as ``key``.

    Attributes:
        there: Whether it is on this machine.
        maker: The stage that makes it, if it is not there and such a stage is known.
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
        """Describe where it comes from."""
        made = "missing: no stage makes it" if self.maker is None else f"made by stage {self.maker.name}"
        return f"{self.name}, {'there' if self.there else 'on the Hub' if self.on_hub else made}"


def find_inputs(recipe: Recipe, stage: Stage) -> list[Input]:
    """Look for what a stage reads: on disk, then among the stages of its recipe and of the recipes beside it."""
    found = []
    for key in ("model", "teacher", "tokenizer", "importance"):
        name = getattr(stage.arguments, key)
        if name is None or (key, name) == ("tokenizer", "train") or (key == "teacher" and stage.arguments.prunes):
            continue
        path = _path_of(key, name)
        maker = None if path.exists() else next(_makers(recipe, stage, path), None)
        on_hub = not path.exists() and maker is None and key != "importance" and _may_be_on_hub(name)
        found.append(Input(key, name, path.exists(), maker, on_hub))
    return found


def _path_of(key: str, name: str) -> Path:
    """Return what must exist; the file of a measurement that is named by its folder."""
    path = Path(name)
    return path / IMPORTANCE_FILE if key == "importance" and path.suffix != Path(IMPORTANCE_FILE).suffix else path


def _may_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _makers(recipe: Recipe, stage: Stage, path: Path) -> Iterator[Maker]:
    """Yield the stages that make a path: those of the recipe, then those of the files beside it, the shortest first."""
    for each in recipe.stages:
        if each.name != stage.name and _makes(each.keys, path):
            yield Maker(each.name, each.keys, _command(recipe.path, each.name, recipe.overrides))
    beside: list[tuple[Path, dict[str, dict[str, Any]]]] = []
    for file in sorted(recipe.path.parent.glob("*.y*ml")):
        # A file is a recipe if it can be read as one; other faults in it show when it is run.
        with suppress(UserError):
            beside += [(file, read_stages(file, {})[1])] if file != recipe.path else []
    for file, stages in sorted(beside, key=lambda item: len(item[1])):
        for name, keys in stages.items():
            if _makes(keys, path):
                yield Maker(name, keys, _command(file, None if len(stages) == 1 else name, {}))


def _makes(keys: Mapping[str, Any], path: Path) -> bool:
    output_dir = Path(str(keys["output_dir"]))
    measures = keys.get("prune_to") is not None and keys.get("importance") is None
    return path == output_dir / FINAL_MODEL or (measures and path == output_dir / IMPORTANCE_FILE)


def _command(recipe: Path, stage: str | None, overrides: Mapping[str, Any]) -> str:
    words = ["python", "training/run_stage.py", str(recipe), *(["--stage", stage] if stage is not None else [])]
    for key, value in overrides.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


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
