"""Uploads a folder with a record: a packed model, or a dataset release."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard
from huggingface_hub.hf_api import RepoFile

from training.common.errors import UserError
from training.common.hub import ATTRIBUTES, Content, check_repository, check_revision, same_files
from training.common.outputs import write_whole
from training.publishing.hub.hub import Hub, HubRepository
from training.publishing.record import RECORD, ModelRelease, load_release

CARD = "README.md"
# A repository with nothing else counts as empty: the Hub's site creates these files.
INCIDENTAL = {ATTRIBUTES, CARD, "LICENSE"}
NOTHING_UPLOADED = "Nothing was uploaded.\n"

# Says why a release must not replace another one, given by its record; None if it may.
ConflictCheck = Callable[[Mapping[str, Any]], "str | None"]


@dataclass(frozen=True)
class Destination:
    """A branch of a repository."""

    repo: str  # ORG/NAME
    kind: str = "model"  # or dataset
    revision: str = "main"
    tag: str | None = None
    private: bool | None = None  # of a new repository; as its owner's settings say if None
    replace: bool = False  # whether another model or dataset may be replaced, and a tag moved

    @classmethod
    def of(cls, arguments: argparse.Namespace, repo: str, kind: str = "model") -> Destination:
        """Return the destination that a command line gives; some commands have neither branch nor tag."""
        given = {key: getattr(arguments, key) for key in ("revision", "tag", "replace") if hasattr(arguments, key)}
        return cls(repo, kind, private=arguments.private or None, **given)

    def __post_init__(self) -> None:
        check_repository(self.repo)
        check_revision("--revision", self.revision)
        if self.tag is not None:
            check_revision("--tag", self.tag)

    def repository(self, hub: Hub) -> HubRepository:
        """Return the repository."""
        return hub.repository(self.repo, self.kind)


def run_push(arguments: argparse.Namespace) -> None:
    """Upload a packed folder, or show what would be uploaded."""
    # Loads torch, which push-data does not need.
    from training.publishing.card import model_card

    folder, place = arguments.folder, Destination.of(arguments, arguments.repo)
    datasets = [check_repository(name, "--data") for name in arguments.data]
    release, contents = load_release(folder), packed_contents(folder)
    if not arguments.no_verify:
        check_packed(folder)
    files = with_card(contents, folder, model_card(folder, place.repo, datasets=datasets))
    if release.adapter is not None and release.is_adapter and not (arguments.no_verify or arguments.dry_run):
        base = Hub().repository(release.adapter.base.name)
        if base.files() is None:
            raise UserError(
                f"the adapter's base is not at {base.address}; push it first, or pack the adapter again with --base "
                "ORG/NAME (to upload it all the same: --no-verify)"
            )
    _finish(arguments, place, files, other_model(release), f"Release {release.name}")


def run_push_data(arguments: argparse.Namespace) -> None:
    """Upload a dataset release, or show what would be uploaded."""
    folder, place = arguments.folder, Destination.of(arguments, arguments.repo, "dataset")
    record = _data_record(folder)
    files = recorded_files(folder, record, "release the data again")
    card = bytes(files[CARD].payload).decode()
    example = re.search(r'load_dataset\("([^"]*)"', card)
    if example:
        # The examples load the repository, and the sentence below the first one names it.
        for text in ('load_dataset("{}"', "\n`{}` is the name on the Hub"):
            card = card.replace(text.format(example[1]), text.format(place.repo))

    def conflict(held: Mapping[str, Any]) -> str | None:
        if held["name"] != record["name"]:
            return f"holds another dataset ({held['name']}, not {record['name']})"
        lost = sorted({*held["sources"]} - {*record["sources"]})
        return f"holds the source {lost[0]}, which this release lacks" if lost else None

    _finish(arguments, place, with_card(files, folder, card), conflict, "Release the dataset")


def _finish(
    arguments: argparse.Namespace,
    place: Destination,
    files: Mapping[str, Content],
    conflict: ConflictCheck,
    message: str,
) -> None:
    if arguments.dry_run:
        text = preview(Hub(), place, files) + write_card(arguments.folder, files) + NOTHING_UPLOADED
    else:
        text = upload(Hub(), place, files, conflict, arguments.message or message)
    sys.stdout.write(text)


def _data_record(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if {"name", "made_of", "sources", "files", "sha256"} <= {*record}:
            return record
    raise UserError(f"{folder / RECORD}: not a record of a dataset release; make one with training/release.py")


def packed_contents(folder: Path) -> dict[str, Content]:
    """Return the files of a packed folder except the record, hashed."""
    release = load_release(folder)
    return recorded_files(folder, {"files": release.files, "sha256": release.sha256}, "pack the run again")


def recorded_files(folder: Path, record: Mapping[str, Any], again: str) -> dict[str, Content]:
    """Return the files of a folder, which must be those of its record (``again`` is the remedy), without hidden ones.

    The record has ``files`` (bytes by path) and ``sha256`` (by path), and does not list itself.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {path: Content(file) for path, file in paths.items() if path != RECORD and "/." not in f"/{path}"}
    sizes, found = record["files"], {path: content.size for path, content in files.items()}
    changed = sorted(path for path in {*sizes, *found} if sizes.get(path) != found.get(path))
    # Sizes are compared first: hashing large files takes minutes.
    changed = changed or sorted(path for path, each in files.items() if each.sha256 != record["sha256"].get(path))
    if changed:
        raise UserError(f"{folder}: {changed[0]} is not as {RECORD} says; {again}")
    return files


def check_packed(folder: Path) -> None:
    """Refuse a packed folder with a fault that the quick checks find; they run nothing of the folder."""
    # Loads torch.
    from training.publishing.verify import RUN, checks_of, examine

    faults = examine(folder, {name: checks for name, checks in checks_of(folder).items() if name != RUN}).faults
    if faults:
        raise UserError(
            f"{folder}: must not be released like this, {len(faults)} faults; the first: {faults[0]} "
            "(all of them: `publish.py verify`; to upload it all the same: --no-verify)"
        )


def with_card(files: Mapping[str, Content], folder: Path, card: str) -> dict[str, Content]:
    """Return the files with another card, and the folder's record with size and hash of that card."""
    content = Content(card.encode())
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record["files"][CARD], record["sha256"][CARD] = content.size, content.sha256
    return {**files, CARD: content, RECORD: Content((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())}


def other_model(release: ModelRelease) -> ConflictCheck:
    """Return the check that a repository holds the same model, which may have been trained again since."""
    own = _identity(json.loads(release.to_json()))

    def conflict(record: Mapping[str, Any]) -> str | None:
        held = _identity(record)
        different = [what for what in own if held[what] != own[what]]
        # The shape of an adapter is unknown if it was packed without its base.
        if release.is_adapter and "shape" in different and not (held["shape"] and own["shape"]):
            different.remove("shape")
        return f"holds the model {held['name']}, which has another {', '.join(different)}" if different else None

    return conflict


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    stages, adapter = record["stages"], record.get("adapter")
    return {
        "name": record["name"],
        "base": adapter and adapter["base"]["name"],
        "shape": record["shape"],
        "list of stages": [(each["name"], each["kind"]) for each in stages],
        "start": [(each["start"]["kind"], each["start"]["name"]) for each in stages[:1]],
    }


def upload(hub: Hub, place: Destination, files: Mapping[str, Content], conflict: ConflictCheck, message: str) -> str:
    """Make a branch hold exactly these files, and tag it. Return a line that says what changed.

    Raises:
        UserError: If something else is there and may not be replaced, or the Hub refuses the upload.
        HubUnavailableError: If the Hub is down; the branch is then unchanged or complete.
    """
    repo = place.repository(hub)
    repo.ensure(place.private)
    before = check_replacement(repo, place, files, conflict)
    commit = repo.publish(files, message, place.revision)
    if place.tag is not None:
        repo.tag(place.tag, commit)
    uploaded = sum(path not in before or not content.is_in(before[path]) for path, content in files.items())
    removed = len({*before} - {*files} - {ATTRIBUTES})
    what = f"{uploaded} files uploaded, {removed} removed" if uploaded or removed else "nothing to change"
    tag = f", tag {place.tag}" if place.tag else ""
    return f"{repo.address}: {what}; {place.revision} at commit {commit[:12]}{tag}\n"


def check_replacement(
    repo: HubRepository, place: Destination, files: Mapping[str, Content], conflict: ConflictCheck
) -> Mapping[str, RepoFile]:
    """Refuse to replace another model or dataset, or to move a tag. Return the files on the branch now."""
    before = repo.files(place.revision)
    if place.replace:
        return before or {}
    # A new branch starts at main.
    revision, held = (place.revision, before) if before is not None else ("main", repo.files() or {})
    reason = None if {*held} <= INCIDENTAL else f"holds {len(held)} files that no {RECORD} lists"
    if RECORD in held:
        try:
            reason = conflict(json.loads(repo.read(RECORD, revision) or b""))
        except (ValueError, KeyError, TypeError, AttributeError):
            reason = f"its {RECORD} is not a record of a release"
    if reason:
        raise UserError(f"{place.repo} at {revision}: {reason}; give another repository, or --replace to replace it")
    tagged = repo.refs()["tag"].get(place.tag)
    if tagged is not None and not same_files(files, repo.files(tagged) or {}):
        raise UserError(
            f"{place.repo}: tag {place.tag} is on commit {tagged[:12]}, which holds other files; give another --tag, "
            "or --replace to move it"
        )
    return before or {}


def preview(hub: Hub, place: Destination, files: Mapping[str, Content]) -> str:
    """Return the files of an upload with their sizes, one per line, and its destination, licence and tag."""
    data = RepoCard(bytes(files[CARD].payload).decode(), ignore_metadata_errors=True).data.to_dict()
    licence = data.get("license_name") or data.get("license") or "not stated"
    lines = [f"{content.size:>15,}  {path}" for path, content in sorted(files.items())]
    return "\n".join(
        [
            *lines,
            f"{sum(content.size for content in files.values()):>15,}  bytes in {len(files)} files",
            f"to {place.repository(hub).address}, revision {place.revision}, tag {place.tag or 'none'}",
            f"licence: {licence if isinstance(licence, str) else ', '.join(licence)}",
            f"a new repository is {'private' if place.private else 'as visible as its owner has set'}\n\n",
        ]
    )


def write_card(folder: Path, *uploads: Mapping[str, Content]) -> str:
    """Write the cards of uploads to a file beside a folder; return a line that names it."""
    path = folder.absolute().with_name(f"{folder.absolute().name}.card.md")
    write_whole(path, "\n".join(bytes(files[CARD].payload).decode() for files in uploads))
    return f"card: {path}\n"
