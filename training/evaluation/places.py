"""Which model is meant: a folder, a run and its checkpoints, or a name on the Hub; and where a run's data are."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from training.common.errors import UserError, in_one_line
from training.common.paths import place_of
from training.common.yaml_file import load_yaml
from training.models.reference import find_model, revisions_in
from training.stages.setup import RECIPE

__all__ = ["find_model", "manifest_of", "revisions_of", "run_of"]


def revisions_of(name: str) -> list[str]:
    """All checkpoints of a run, oldest first, or all branches and tags of a repository on the Hub.

    Raises:
        UserError: If the Hub cannot be asked.
    """
    if Path(name).is_dir():
        return revisions_in(Path(name))
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
    manifest = place_of(run, keys, str(keys["manifest"])) if keys.get("manifest") else None
    return manifest if manifest is not None and manifest.is_file() else None
