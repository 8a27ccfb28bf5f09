"""Uploads a packed model: what is sent, and whether it may replace what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from training.errors import UserError
from training.publishing.content import RemoteFile
from training.publishing.destination import Destination, recorded_files, upload
from training.publishing.hub import Hub
from training.publishing.record import RECORD, ModelRelease, load_release

__all__ = ["model_files", "push_model"]

CARD = "README.md"


def push_model(folder: Path, place: Destination, hub: Hub, message: str | None = None) -> str:
    """Uploads a packed folder; run twice, it changes nothing.

    Args:
        folder: The packed folder; it is not changed.
        place: Where to.
        hub: The Hub.
        message: Of the commit.

    Returns:
        What changed, and the address.

    Raises:
        UserError: If the folder is not packed or was changed since, or the upload is refused.
        HubUnavailableError: If the Hub is down; the revision is then as it was, or whole.
    """
    release = load_release(folder)
    files = model_files(folder, place.repo)

    def objection(held: Mapping[str, RemoteFile], record: bytes | None) -> str | None:
        if record is None:
            return f"holds {len(held)} files that no release.json tells of"
        return _difference(release, record)

    message = message or f"Release {release.name}"
    return upload(hub, place, files, record=RECORD, objection=objection, message=message)


def model_files(folder: Path, repository: str) -> dict[str, Path | bytes]:
    """The files of a packed folder as they are uploaded: the card's examples load the repository.

    Raises:
        UserError: If the folder is not packed, or was changed since.
    """
    from training.publishing.card import model_card

    sizes = load_release(folder).files
    files: dict[str, Path | bytes] = dict(recorded_files(folder, RECORD, sizes, "pack the run again"))
    if CARD not in files:
        raise UserError(f"{folder}: has no card ({CARD}); pack the run again")
    card = model_card(folder, repository).encode()
    # The record lists the size of every file.
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record["files"][CARD] = len(card)
    files[CARD] = card
    files[RECORD] = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _difference(release: ModelRelease, record: bytes) -> str | None:
    """How the model of a repository differs from one that is to take its place; None if it is the same.

    A model is the same if it has the same name and shape, and came about by the same stages from the same start: a
    version that was trained again may replace it, another model may not.
    """
    try:
        found = json.loads(record)
        stages = [(stage["name"], stage["kind"]) for stage in found["stages"]]
        start = [found["stages"][0]["start"][key] for key in ("kind", "name")] if found["stages"] else []
        name, shape = found["name"], found["shape"]
    except (ValueError, KeyError, TypeError):
        return f"its {RECORD} is no record of a model"
    own_start = [release.stages[0].start.kind, release.stages[0].start.name] if release.stages else []
    if name != release.name:
        return f"holds another model ({name}, not {release.name})"
    if shape != release.shape:
        return f"holds a model {name} of another shape"
    if stages != [(stage.name, stage.kind) for stage in release.stages] or start != own_start:
        return f"holds a model {name} that came about by other stages"
    return None
