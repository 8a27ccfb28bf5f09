"""Which model is meant: a folder, a run and its checkpoints, or a name on the Hub; resolved once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from training.common.errors import UserError
from training.common.run_folder import FINAL_MODEL, numbered_checkpoints
from training.models.model_identity import MODEL_FILES, model_revision


class ModelRef(NamedTuple):
    """A model that was found.

    Attributes:
        name: What the user called it.
        place: Its folder, or its Hub name.
        revision: The commit on the Hub; None for a folder.
        identity: What the model is now: that commit, or a digest of the folder's files.
    """

    name: str
    place: str
    revision: str | None
    identity: str


def resolve(name: str, key: str, revision: str | None = None) -> ModelRef:
    """Finds a model and what it is now, without loading it.

    Args:
        name: Folder, run, or Hub name; of a model or of an adapter.
        key: What the user has to correct if there is no such model, such as ``--model`` or ``key 'teacher'``.
        revision: Branch, tag or commit on the Hub, or checkpoint of a run.

    Raises:
        UserError: If there is no such model.
    """
    place, at = find_model(name, revision, key)
    identity = model_revision(place, key, at)
    return ModelRef(name, place, None if Path(place).is_dir() else identity, identity)


def holds_model_files(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, however damaged."""
    return any((folder / name).is_file() for name in MODEL_FILES)


def find_model(name: str, revision: str | None, key: str | None = None) -> tuple[str, str | None]:
    """What to load: folder and None, or Hub name and revision.

    A run's folder stands for its finished model, or its newest checkpoint; its revisions are its checkpoints.

    Args:
        name: Folder, run, or Hub name.
        revision: Branch, tag or commit on the Hub, or checkpoint of a run.
        key: What the user has to correct, for the message.

    Raises:
        UserError: If a folder holds no model, or a run no such checkpoint.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name, revision
    if revision is not None:
        if not holds_model_files(folder / revision):
            there = ", ".join(revisions_in(folder)) or "none"
            raise UserError(f"{folder}: no checkpoint {revision!r} in it; there are {there}")
        return str(folder / revision), None
    for place in (folder, folder / FINAL_MODEL, *reversed(numbered_checkpoints(folder))):
        if holds_model_files(place):
            return str(place), None
    stages = sorted(path.parent.name for path in folder.glob(f"*/{FINAL_MODEL}") if holds_model_files(path))
    hint = f"name one of its stages: {', '.join(stages)}" if stages else "name the folder of a model or of a run"
    raise UserError(f"{folder}: the folder holds no model; {hint}{f' as {key}' if key else ''}")


def revisions_in(run: Path) -> list[str]:
    """The names of a run's checkpoints, the oldest first."""
    return [path.name for path in numbered_checkpoints(run)]
