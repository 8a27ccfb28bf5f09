"""Uploads a packed model: what is sent, and whether it may replace what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.common.content import Content, RemoteFile
from training.common.errors import UserError
from training.publishing.hub.destination import Destination, Objection, recorded_files, upload
from training.publishing.hub.hub import Hub
from training.publishing.record import RECORD, ModelRelease, load_release

CARD = "README.md"


def push_model(
    folder: Path,
    place: Destination,
    hub: Hub,
    *,
    message: str | None = None,
    card: str | None = None,
    datasets: Sequence[str] = (),
    check: bool = True,
    contents: Mapping[str, Content] | None = None,
) -> str:
    """Uploads a packed folder; run twice, it changes nothing.

    Args:
        folder: The packed folder; it is not changed.
        place: Where to.
        hub: The Hub.
        message: Of the commit.
        card: As for :func:`packed_files`.
        datasets: As for :func:`packed_files`.
        check: As for :func:`packed_files`.
        contents: As for :func:`packed_files`.

    Returns:
        What changed, and the address.

    Raises:
        UserError: If the folder is not packed, was changed since or has a fault, or the upload is refused.
        HubUnavailableError: If the Hub is down; the revision is then as it was, or whole.
    """
    release = load_release(folder)
    files = packed_files(folder, place.repo, card=card, datasets=datasets, check=check, contents=contents)
    if check and release.adapter is not None and release.is_adapter:
        _check_base(release.adapter.base.name, hub)
    message = message or f"Release {release.name}"
    return upload(hub, place, files, record=RECORD, objection=other_model(release), message=message)


def other_model(release: ModelRelease) -> Objection:
    """The objection to a release taking the place of another model."""

    def objection(held: Mapping[str, RemoteFile], record: bytes | None) -> str | None:
        if record is None:
            return f"holds {len(held)} files that no {RECORD} tells of"
        return _difference(release, record)

    return objection


def packed_contents(folder: Path) -> dict[str, Content]:
    """The files of a packed folder but the record, hashed: those are uploaded, or none.

    Raises:
        UserError: If the folder is not packed, or was changed since.
    """
    release = load_release(folder)
    return recorded_files(folder, RECORD, release.files, release.sha256, "pack the run again")


def packed_files(
    folder: Path,
    repository: str,
    *,
    card: str | None = None,
    datasets: Sequence[str] = (),
    check: bool = True,
    contents: Mapping[str, Content] | None = None,
) -> dict[str, Content]:
    """The files of a packed folder as they are uploaded, by path.

    Args:
        folder: The packed folder.
        repository: Name on the Hub, which the card's examples load.
        card: The card to upload; that of the release, for this repository, if None.
        datasets: Data sets on the Hub for the release's card, besides those of its record.
        check: Whether the folder must pass the checks that take a moment.
        contents: Its files as :func:`packed_contents` has them, if they were hashed before.

    Raises:
        UserError: If the folder is not packed, was changed since, or has a fault.
    """
    from training.publishing.card import model_card

    files = dict(packed_contents(folder) if contents is None else contents)
    if check:
        _check_packed(folder)
    text = (model_card(folder, repository, datasets=datasets) if card is None else card).encode()
    files[CARD] = Content(text)
    # The record lists size and hash of every file.
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record["files"][CARD], record["sha256"][CARD] = files[CARD].size, files[CARD].sha256
    files[RECORD] = Content((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return files


def _check_packed(folder: Path) -> None:
    """Makes sure that a packed folder passes the checks that take a moment, and run nothing of it.

    Raises:
        UserError: If it does not.
    """
    from training.publishing.verify import RUN, checks_of, examine

    quick = {name: checks for name, checks in checks_of(folder).items() if name != RUN}
    faults = examine(folder, quick).faults
    if faults:
        raise UserError(
            f"{folder}: must not be released like this, {len(faults)} faults; the first: {faults[0]} "
            "(all of them: `publish.py verify`; to upload it all the same: --no-verify)"
        )


def _check_base(name: str, hub: Hub) -> None:
    """Makes sure that whoever loads an adapter finds its base.

    Raises:
        UserError: If it is not on the Hub.
    """
    if hub.files(name) is None:
        raise UserError(
            f"the adapter's base is not at {hub.address(name)}; push it first, or pack the adapter again with --base "
            "ORG/NAME (to upload it all the same: --no-verify)"
        )


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
        base = (found.get("adapter") or {}).get("base", {}).get("name")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {RECORD} is no record of a model"
    own_start = [release.stages[0].start.kind, release.stages[0].start.name] if release.stages else []
    if name != release.name:
        return f"holds another model ({name}, not {release.name})"
    if base != (release.adapter and release.adapter.base.name):
        return f"holds {name} of another base ({base or 'none'})"
    # The shape of an adapter is not known where its base was not at hand.
    if shape != release.shape and (not release.is_adapter or (shape and release.shape)):
        return f"holds a model {name} of another shape"
    if stages != [(stage.name, stage.kind) for stage in release.stages] or start != own_start:
        return f"holds a model {name} that came about by other stages"
    return None
