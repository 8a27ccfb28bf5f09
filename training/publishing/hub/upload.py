"""Uploads a folder with a record: a packed model, or a dataset release."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard

from training.common.errors import UserError
from training.common.hub import ATTRIBUTES, Content, check_repository, check_revision, same_files
from training.common.outputs import write_whole
from training.publishing.hub.hub import Hub, HubRepository
from training.publishing.record import RECORD, load_release

CARD = "README.md"
# A repository with nothing else counts as empty: the Hub's site creates these files.
INCIDENTAL = {ATTRIBUTES, CARD, "LICENSE"}
NOTHING_UPLOADED = "Nothing was uploaded.\n"


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
        return HubRepository(hub, self.repo, self.kind)


def run_push(arguments: argparse.Namespace) -> None:
    """Upload a packed folder, or show what would be uploaded."""
    # Loads torch, which push-data does not need.
    from training.publishing.card import model_card

    folder, place = arguments.folder, Destination.of(arguments, arguments.repo)
    datasets = [check_repository(name, "--data") for name in arguments.data]
    release, contents = load_release(folder), recorded_files(folder)
    if not arguments.no_verify:
        check_packed(folder)
    if release.adapter is not None and release.is_adapter and not (arguments.no_verify or arguments.dry_run):
        base = HubRepository(Hub(), release.adapter.base.name)
        if base.files() is None:
            raise UserError(
                f"the adapter's base is not at {base.address}; push it first, or pack the adapter again with --base "
                "ORG/NAME (to upload it all the same: --no-verify)"
            )
    _finish(arguments, place, with_card(contents, model_card(folder, place.repo, datasets=datasets)))


def run_push_data(arguments: argparse.Namespace) -> None:
    """Upload a dataset release, or show what would be uploaded."""
    folder, place = arguments.folder, Destination.of(arguments, arguments.repo, "dataset")
    record: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not {"name", "made_of", "sources", "files", "sha256"} <= {*record}:
        raise UserError(f"{folder / RECORD}: not a record of a dataset release; make one with training/release.py")
    files = recorded_files(folder)
    card = files[CARD].source.decode()
    example = re.search(r'load_dataset\("([^"]*)"', card)
    if example:
        # The examples load the repository, and the sentence below the first one names it.
        for text in ('load_dataset("{}"', "\n`{}` is the name on the Hub"):
            card = card.replace(text.format(example[1]), text.format(place.repo))
    _finish(arguments, place, with_card(files, card))


def _finish(arguments: argparse.Namespace, place: Destination, files: Mapping[str, Content]) -> None:
    if arguments.dry_run:
        sys.stdout.write(preview(Hub(), place, files) + write_card(arguments.folder, files) + NOTHING_UPLOADED)
    else:
        sys.stdout.write(upload(Hub(), place, files, arguments.message))


def recorded_files(folder: Path) -> dict[str, Content]:
    """Return the files of a folder, hashed. Refuse others than those of its record, not counting hidden ones."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    # The card and the record are read here: they are changed for the repository.
    known = {path: file.read_bytes() if path in (CARD, RECORD) else file for path, file in paths.items()}
    files = {path: Content(source) for path, source in known.items() if "/." not in f"/{path}"}
    record = _record(files)
    sizes, found = record["files"], {path: content.size for path, content in files.items() if path != RECORD}
    changed = sorted(path for path in {*sizes, *found} if sizes.get(path) != found.get(path))
    # Sizes are compared first: hashing large files takes minutes.
    changed = changed or [path for path in found if files[path].sha256 != record["sha256"].get(path)]
    if changed:
        raise UserError(f"{folder}: {changed[0]} is not as {RECORD} says; pack the run, or release the data, again")
    return files


def _record(files: Mapping[str, Content]) -> dict[str, Any]:
    return json.loads(files[RECORD].source)


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


def with_card(files: Mapping[str, Content], card: str) -> dict[str, Content]:
    """Return the files with another card, and a record with size and hash of that card."""
    content, record = Content(card.encode()), _record(files)
    record["files"][CARD], record["sha256"][CARD] = content.size, content.sha256
    return {**files, CARD: content, RECORD: Content((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())}


def other_model(held: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Say what a repository holds, given by its record, if it is another model; one may be trained again."""

    def identity(record: Mapping[str, Any]) -> list[Any]:
        stages, adapter = record["stages"], record.get("adapter")
        # The shape of an adapter is unknown if it was packed without its base.
        shape = adapter["base"]["name"] if adapter else record["shape"]
        start = [(each["start"]["kind"], each["start"]["name"]) for each in stages[:1]]
        return [record["name"], shape, start, [(each["name"], each["kind"]) for each in stages]]

    same = identity(held) == identity(own)
    return None if same else f"holds another model ({held['name']}, by its name, shape, start or stages)"


def other_dataset(held: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Say what a repository holds, given by its record, if it is another dataset, or has another source."""
    if held["name"] != own["name"]:
        return f"holds another dataset ({held['name']}, not {own['name']})"
    lost = sorted({*held["sources"]} - {*own["sources"]})
    return f"holds the source {lost[0]}, which this release lacks" if lost else None


# Why a release must not replace another one, by kind of repository.
CONFLICTS = {"model": other_model, "dataset": other_dataset}


def upload(hub: Hub, place: Destination, files: Mapping[str, Content], message: str | None = None) -> str:
    """Make a branch hold exactly these files, and tag it. Return a line that says what changed.

    Raises:
        HubUnavailableError: If the Hub is down; the branch is then unchanged or complete.
    """
    repo = place.repository(hub)
    repo.ensure(place.private)
    check_replacement(repo, place, files)
    before = repo.refs()["branch"].get(place.revision)
    commit = repo.write_branch(files, message or f"Release {_record(files)['name']}", place.revision)
    if place.tag is not None:
        repo.tag(place.tag, commit)
    what = "nothing to change" if commit == before else f"{len(files)} files uploaded"
    tag = f", tag {place.tag}" if place.tag else ""
    return f"{repo.address}: {what}; {place.revision} at commit {commit[:12]}{tag}\n"


def check_replacement(repo: HubRepository, place: Destination, files: Mapping[str, Content]) -> None:
    """Refuse to replace another model or dataset, or to move a tag, unless the destination allows it."""
    if place.replace:
        return
    revision, held = place.revision, repo.files(place.revision)
    if held is None:
        # A new branch starts at main.
        revision, held = "main", repo.files() or {}
    reason = None if {*held} <= INCIDENTAL else f"holds {len(held)} files that no {RECORD} lists"
    if RECORD in held:
        try:
            reason = CONFLICTS[place.kind](json.loads(repo.read(RECORD, revision) or b""), _record(files))
        except (ValueError, KeyError, TypeError, AttributeError):
            reason = f"its {RECORD} is not a record of a release"
    tagged = repo.refs()["tag"].get(place.tag)
    if not reason and tagged is not None and not same_files(files, repo.files(tagged) or {}):
        reason = f"tag {place.tag} is on commit {tagged[:12]}, which holds other files"
    if reason:
        raise UserError(f"{place.repo} at {revision}: {reason}; give another repository or tag, or --replace")


def preview(hub: Hub, place: Destination, files: Mapping[str, Content]) -> str:
    """Return the files of an upload with their sizes, one per line, and its destination, licence and tag."""
    data = RepoCard(files[CARD].source.decode(), ignore_metadata_errors=True).data.to_dict()
    licence = data.get("license_name") or data.get("license") or "not stated"
    sizes = {path: content.size for path, content in sorted(files.items())}
    lines = [
        *(f"{size:>15,}  {path}" for path, size in sizes.items()),
        f"{sum(sizes.values()):>15,}  bytes in {len(files)} files",
        f"to {place.repository(hub).address}, revision {place.revision}, tag {place.tag or 'none'}",
        f"licence: {licence if isinstance(licence, str) else ', '.join(licence)}",
        f"a new repository is {'private' if place.private else 'as visible as its owner has set'}\n\n",
    ]
    return "\n".join(lines)


def write_card(folder: Path, *cards: Mapping[str, Content]) -> str:
    """Write the cards of uploads to a file beside a folder; return a line that names it."""
    path = folder.absolute().with_name(f"{folder.absolute().name}.card.md")
    write_whole(path, "\n".join(files[CARD].source.decode() for files in cards))
    return f"card: {path}\n"
