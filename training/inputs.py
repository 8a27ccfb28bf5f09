"""What a stage starts from: whether it is there, and if not, which stage makes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from training.errors import UserError
from training.recipe import FINAL_MODEL, Recipe, Stage, read_stages

__all__ = ["Input", "check_inputs", "inputs_of"]

_KEYS = ("model", "teacher", "importance")


class Input(NamedTuple):
    """Something that a stage starts from.

    Attributes:
        key: Its key in the recipe.
        name: Folder, file, address or Hub name.
        state: Whether it is there, or where it comes from.
    """

    key: str
    name: str
    state: str


def inputs_of(stage: Stage, before: Sequence[Stage]) -> list[Input]:
    """The model, teacher, importance and data of a stage, and where they come from.

    Args:
        stage: The stage.
        before: The stages that run before it.
    """
    arguments = stage.arguments
    inputs = [Input(key, name, _state(key, name, before)) for key, name in _named(stage)]
    if arguments.manifest is not None:
        state = f"made by the builder {arguments.builder!r}" if arguments.builder else "there"
        inputs.append(Input("data", arguments.data_dir or arguments.manifest, state))
    return inputs


def _named(stage: Stage) -> Iterator[tuple[str, str]]:
    for key in _KEYS:
        name = getattr(stage.arguments, key)
        if name is not None:
            yield key, str(name)


def _state(key: str, name: str, before: Sequence[Stage]) -> str:
    for earlier in before:
        if _makes(earlier.arguments.output_dir, key, name):
            return f"made by stage {earlier.name}"
    if Path(name).exists():
        return "there"
    return "missing" if _is_local(name) else "on the Hub"


def _makes(output_dir: str, key: str, name: str) -> bool:
    """Whether a stage that writes to a folder makes what a key names."""
    made = {Path(output_dir), Path(output_dir, "importance.safetensors")}
    return Path(name) in made if key == "importance" else Path(name) == Path(output_dir, FINAL_MODEL)


def _is_local(name: str) -> bool:
    """Whether a name can only be a path: the Hub's have one slash at most and start with a letter or digit."""
    return name.count("/") > 1 or not name[:1].isalnum() or name.endswith(".safetensors")


def check_inputs(recipe: Recipe, chosen: Sequence[Stage]) -> None:
    """Makes sure that each chosen stage finds what it starts from, or that one before it makes it.

    Raises:
        UserError: If something is missing; the message names the stage that makes it and the command, if a stage of the
            recipe or of one in the same folder does.
    """
    for number, stage in enumerate(chosen):
        for key, name in _named(stage):
            if any(_makes(earlier.arguments.output_dir, key, name) for earlier in chosen[:number]):
                continue
            if Path(name).exists() or not (_is_local(name) or _maker(recipe, key, name)):
                continue
            raise UserError(f"stage {stage.name!r}: {key} {name} is missing; {_remedy(recipe, key, name)}")


def _remedy(recipe: Recipe, key: str, name: str) -> str:
    maker = _maker(recipe, key, name)
    if maker is None:
        return f"no stage of the recipes in {recipe.path.parent} makes it; correct the path"
    path, stage = maker
    option = f" --stage {stage}" if _has_stages(path) else ""
    return f"stage {stage!r} makes it; run it first: python training/run_stage.py {path}{option}"


def _maker(recipe: Recipe, key: str, name: str) -> tuple[Path, str] | None:
    """The recipe and the stage that make something: of this recipe, else of one beside it."""
    for stage in recipe.stages:
        if _makes(stage.arguments.output_dir, key, name):
            return recipe.path, stage.name
    for path in sorted(recipe.path.parent.glob("*.yaml")):
        try:
            _, stages = read_stages(path, {})
        # A part that others extend, or a recipe under work: it makes nothing that could be named here.
        except UserError:
            continue
        for stage_name, keys in stages.items():
            if _makes(str(keys.get("output_dir", "")), key, name):
                return path, stage_name
    return None


def _has_stages(path: Path) -> bool:
    return "\nstages:" in path.read_text(encoding="utf-8")
