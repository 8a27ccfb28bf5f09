"""Which model is meant: a folder, a run and its checkpoints, or a name on the Hub; and where a run's data are."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from training.checkpoints import numbered_checkpoints
from training.errors import UserError, in_one_line
from training.publishing.states import ModelState
from training.recipe import FINAL_MODEL
from training.setup import RECIPE
from training.yaml_file import load_yaml

__all__ = ["find_model", "manifest_of", "revisions_of", "run_of"]


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("modules.json", "config.json"))


def find_model(name: str, revision: str | None) -> tuple[str, str | None]:
    """What to load: folder and None, or Hub name and revision.

    A run's folder stands for its finished model, or its newest checkpoint; its revisions are its checkpoints.

    Raises:
        UserError: If a folder holds no model, or a run no such checkpoint.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name, revision
    if revision is not None:
        if not _holds_model(folder / revision):
            there = ", ".join(revisions_of(name)) or "none"
            raise UserError(f"{folder}: no checkpoint {revision!r} in it; there are {there}")
        return str(folder / revision), None
    for place in (folder, folder / FINAL_MODEL, *reversed(numbered_checkpoints(folder))):
        if _holds_model(place):
            return str(place), None
    stages = sorted(path.parent.name for path in folder.glob(f"*/{FINAL_MODEL}") if _holds_model(path))
    hint = f"name one of its stages: {', '.join(stages)}" if stages else "name the folder of a model or of a run"
    raise UserError(f"{folder}: the folder holds no model; {hint}")


def revisions_of(name: str) -> list[str]:
    """All checkpoints of a run, oldest first, or all branches and tags of a repository on the Hub.

    Raises:
        UserError: If the Hub cannot be asked.
    """
    if Path(name).is_dir():
        return [path.name for path in numbered_checkpoints(Path(name))]
    try:
        refs = HfApi().list_repo_refs(name)
    # What the Hub's client raises differs with the network, the name and the version.
    except Exception as error:
        raise UserError(f"{name}: its revisions cannot be listed ({in_one_line(error)}); name them") from None
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def run_of(name: str) -> Path | None:
    """The folder of the run that a folder is, or is the model or a checkpoint of; None if there is none."""
    folder = Path(name)
    return next((place for place in (folder, folder.parent) if (place / RECIPE).is_file()), None)


def manifest_of(run: Path) -> Path | None:
    """The manifest of the data that a run was trained on; None if it is no longer there."""
    keys = load_yaml(run / RECIPE)
    manifest = ModelState(run, run, keys).place(str(keys["manifest"])) if keys.get("manifest") else None
    return manifest if manifest is not None and manifest.is_file() else None
