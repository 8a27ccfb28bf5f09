"""Uploads a dataset release: what is sent, and whether it may replace what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.common.content import Content, RemoteFile
from training.common.errors import UserError
from training.publishing.hub.destination import Destination, recorded_files, upload
from training.publishing.hub.hub import Hub

CARD, RECORD = "README.md", "release.json"
_EXAMPLE = re.compile(r'load_dataset\("([^"]*)"')


def push_data(folder: Path, place: Destination, hub: Hub, *, message: str | None = None) -> str:
    """Uploads a folder of ``training/data/release.py``; run twice, it changes nothing.

    Args:
        folder: The release; it is not changed.
        place: Where to.
        hub: The Hub.
        message: Of the commit.

    Returns:
        What changed, and the address.

    Raises:
        UserError: If the folder is no release or was changed since, or the upload is refused.
        HubUnavailableError: If the Hub is down; the revision is then as it was, or whole.
    """
    own = _record(folder)
    sources = {*own["sources"]}
    files = data_files(folder, place.repo)

    def objection(held: Mapping[str, RemoteFile], record: bytes | None) -> str | None:
        if record is None:
            return f"holds {len(held)} files that no {RECORD} tells of"
        try:
            content = json.loads(record)
            name, found = content["name"], {*content["sources"]}
        except (ValueError, KeyError, TypeError):
            return f"its {RECORD} is no record of a dataset release"
        if name != own["name"]:
            return f"holds another dataset ({name}, not {own['name']})"
        lost = sorted(found - sources)
        return f"holds the source {lost[0]}, which this release has not" if lost else None

    return upload(hub, place, files, record=RECORD, objection=objection, message=message or "Release the dataset")


def data_files(folder: Path, repository: str) -> dict[str, Content]:
    """The files of a release as they are uploaded: the card's examples load the repository.

    Raises:
        UserError: If the folder is no release, or was changed since.
    """
    record = _record(folder)
    files = recorded_files(folder, RECORD, record["files"], record["sha256"], "release the data again")
    if CARD not in files:
        raise UserError(f"{folder}: has no card ({CARD}); release the data again")
    files[CARD] = Content(_card(bytes(files[CARD].payload).decode(), repository).encode())
    record["files"][CARD], record["sha256"][CARD] = files[CARD].size, files[CARD].sha256
    files[RECORD] = Content((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return files


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted({"name", "made_of", "sources", "files", "sha256"} - {*record})
        if not missing:
            return record
        fault = f"it lacks {', '.join(missing)}"
    except (OSError, ValueError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
    raise UserError(f"{path}: no record of a dataset release ({fault}); make one with training/data/release.py")


def _card(text: str, repository: str) -> str:
    """A card whose examples load the repository."""
    names = _EXAMPLE.findall(text)
    if not names:
        return text
    # The sentence below the first example names it, too.
    return text.replace(f'load_dataset("{names[0]}"', f'load_dataset("{repository}"').replace(
        f"\n`{names[0]}` is the name on the Hub", f"\n`{repository}` is the name on the Hub"
    )
