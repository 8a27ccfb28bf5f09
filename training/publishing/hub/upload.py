"""Uploads a folder with a record: a packed model, or a dataset release."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from huggingface_hub import RepoCard

from training.common.errors import UserError
from training.common.hub import (
    ATTRIBUTES,
    Content,
    RemoteFile,
    check_repository,
    check_revision,
    same_files,
)
from training.common.outputs import write_whole
from training.publishing.hub.hub import Hub, HubRepository
from training.publishing.record import RECORD, ModelRelease, load_release

CARD = "README.md"
# A repository with nothing else counts as empty: the Hub's site creates these files.
INCIDENTAL = {ATTRIBUTES, CARD, "LICENSE"}

# Says why a release must not replace another one, given by its record; None if it may.
ConflictCheck = Callable[[Mapping[str, Any]], "str | None"]


@dataclass(frozen=True)
class Destination:
    """A branch of a repository.

    Attributes:
        repo: ``ORG/NAME``.
        kind: ``model`` or ``dataset``.
        revision: The branch.
        tag: Tag for the commit; None for no tag.
        private: Whether a new repository is private; as its owner's settings say if None.
        replace: Whether another model or dataset may be replaced, and a tag moved.
    """

    repo: str
    kind: str = "model"
    revision: str = "main"
    tag: str | None = None
    private: bool | None = None
    replace: bool = False

    @classmethod
    def of(cls, arguments: argparse.Namespace, kind: str) -> Destination:
        """Return the destination that a command line gives."""
        private = arguments.private or None
        return cls(arguments.repo, kind, arguments.revision, arguments.tag, private, arguments.replace)

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

    folder, place, check = arguments.folder, Destination.of(arguments, "model"), not arguments.no_verify
    datasets = [check_repository(name, "--data") for name in arguments.data]
    release, contents = load_release(folder), packed_contents(folder)
    if check:
        check_packed(folder)
    files = with_card(contents, folder, model_card(folder, place.repo, datasets=datasets))
    hub = Hub()
    if arguments.dry_run:
        sys.stdout.writelines(_preview(hub, folder, place, files, checks_line(check)))
        return
    if check and release.adapter is not None and release.is_adapter:
        base = hub.repository(release.adapter.base.name)
        if base.files() is None:
            raise UserError(
                f"the adapter's base is not at {base.address}; push it first, or pack the adapter again with --base "
                "ORG/NAME (to upload it all the same: --no-verify)"
            )
    report = upload(hub, place, files, other_model(release), arguments.message or f"Release {release.name}")
    sys.stdout.write(f"{report}\n")


def run_push_data(arguments: argparse.Namespace) -> None:
    """Upload a dataset release, or show what would be uploaded."""
    folder, place, hub = arguments.folder, Destination.of(arguments, "dataset"), Hub()
    record = _data_record(folder)
    files = recorded_files(folder, record, "release the data again")
    if CARD not in files:
        raise UserError(f"{folder}: has no card ({CARD}); release the data again")
    card = card_text(files)
    example = re.search(r'load_dataset\("([^"]*)"', card)
    if example:
        # The examples load the repository, and the sentence below the first one names it.
        for text in ('load_dataset("{}"', "\n`{}` is the name on the Hub"):
            card = card.replace(text.format(example[1]), text.format(place.repo))
    files = with_card(files, folder, card)
    if arguments.dry_run:
        sys.stdout.writelines(_preview(hub, folder, place, files, f"the files are those that {RECORD} lists"))
        return

    def conflict(held: Mapping[str, Any]) -> str | None:
        if held["name"] != record["name"]:
            return f"holds another dataset ({held['name']}, not {record['name']})"
        lost = sorted({*held["sources"]} - {*record["sources"]})
        return f"holds the source {lost[0]}, which this release lacks" if lost else None

    sys.stdout.write(f"{upload(hub, place, files, conflict, arguments.message or 'Release the dataset')}\n")


def _data_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        missing = sorted({"name", "made_of", "sources", "files", "sha256"} - {*record})
        fault = f"it lacks {', '.join(missing)}" if missing else None
    except (OSError, ValueError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise UserError(
            f"{folder / RECORD}: not a record of a dataset release ({fault}); make one with training/release.py"
        )
    return record


def packed_contents(folder: Path) -> dict[str, Content]:
    """Return the files of a packed folder except the record, hashed."""
    release = load_release(folder)
    return recorded_files(folder, {"files": release.files, "sha256": release.sha256}, "pack the run again")


def recorded_files(folder: Path, record: Mapping[str, Any], again: str) -> dict[str, Content]:
    """Return the files of a folder, which must be those that its record lists. Hidden files are left out.

    Args:
        folder: The folder.
        record: With ``files`` (bytes by path) and ``sha256`` (by path); it does not list itself.
        again: The remedy if they differ.
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
    """Return the check that a repository holds the same model: of the same name, base, shape, start and stages.

    A version that was trained again may replace it, another model may not.
    """

    def conflict(record: Mapping[str, Any]) -> str | None:
        name, shape, base = record["name"], record["shape"], (record.get("adapter") or {}).get("base", {}).get("name")
        stages = [(each["name"], each["kind"]) for each in record["stages"]]
        start = [(each["start"]["kind"], each["start"]["name"]) for each in record["stages"][:1]]
        if name != release.name:
            return f"holds another model ({name}, not {release.name})"
        if base != (release.adapter and release.adapter.base.name):
            return f"holds {name} of another base ({base or 'none'})"
        # The shape of an adapter is unknown if it was packed without its base.
        if shape != release.shape and (not release.is_adapter or (shape and release.shape)):
            return f"holds a model {name} of another shape"
        same_stages = stages == [(stage.name, stage.kind) for stage in release.stages]
        if same_stages and start == [(stage.start.kind, stage.start.name) for stage in release.stages[:1]]:
            return None
        return f"holds a model {name} that was made by other stages"

    return conflict


def upload(hub: Hub, place: Destination, files: Mapping[str, Content], conflict: ConflictCheck, message: str) -> str:
    """Make a branch hold exactly these files, and tag it. Return what changed, and the address.

    Raises:
        UserError: If something else is there and may not be replaced, or the Hub refuses the upload.
        HubUnavailableError: If the Hub is down; the branch is then unchanged or complete.
    """
    repo = place.repository(hub)
    repo.ensure(place.private)
    before = check_replacement(repo, place, files, conflict)
    commit = repo.publish(files, message, place.revision)
    if place.tag is not None:
        repo.tag(place.tag, commit, replace=place.replace)
    after = repo.files(commit) or {}
    added, removed = len({*after} - {*before} - {ATTRIBUTES}), len({*before} - {*after})
    changed = sum(path in before and before[path] != file for path, file in after.items())
    what = f"{added} files added, {changed} changed, {removed} removed"
    what = what if added or changed or removed else "nothing to change"
    tag = f", tag {place.tag}" if place.tag else ""
    return f"{repo.address}: {what}; {place.revision} at commit {commit[:12]}{tag}"


def check_replacement(
    repo: HubRepository, place: Destination, files: Mapping[str, Content], conflict: ConflictCheck
) -> Mapping[str, RemoteFile]:
    """Refuse to replace another model or dataset, or to move a tag. Return the files on the branch now."""
    before = repo.files(place.revision)
    if place.replace:
        return before or {}
    # A new branch starts at main.
    revision, held = (place.revision, before) if before is not None else ("main", repo.files() or {})
    reason = None if {*held} <= INCIDENTAL else f"holds {len(held)} files that no {RECORD} lists"
    record = repo.read(RECORD, revision) if RECORD in held else None
    if record is not None:
        try:
            reason = conflict(json.loads(record))
        except (ValueError, KeyError, TypeError, AttributeError):
            reason = f"its {RECORD} is not a record of a release"
    if reason:
        raise UserError(f"{place.repo} at {revision}: {reason}; give another repository, or --replace to replace it")
    tagged = (repo.refs() or {"tag": {}})["tag"].get(place.tag)
    if tagged is not None and not same_files(files, repo.files(tagged) or {}):
        raise UserError(
            f"{place.repo}: tag {place.tag} is on commit {tagged[:12]}, which holds other files; give another --tag, "
            "or --replace to move it"
        )
    return before or {}


def card_text(files: Mapping[str, Content]) -> str:
    """Return the card among the files of an upload."""
    return bytes(files[CARD].payload).decode()


def file_list(files: Mapping[str, Content]) -> str:
    """Return the files of an upload with their sizes, one per line."""
    width = max(len(f"{content.size:,}") for content in files.values())
    return "".join(f"{content.size:>{width},}  {path}\n" for path, content in sorted(files.items()))


def write_card(folder: Path, text: str) -> Path:
    """Write a card beside a folder, or to a temporary folder if that cannot be written; return its path."""
    path = folder.absolute().with_name(f"{folder.absolute().name}.card.md")
    try:
        write_whole(path, text)
    except OSError:
        path = Path(mkdtemp(prefix="f2llm-card-"), path.name)
        write_whole(path, text)
    return path


def checks_line(check: bool) -> str:
    """Return what a preview says of the checks of a packed folder."""
    return "no fault; embeddings were not computed (`publish.py verify` does)" if check else "not made (--no-verify)"


def upload_rows(place: Destination, where: str, files: Mapping[str, Content]) -> list[tuple[str, str]]:
    """Return what a preview says of an upload to ``where``: files, licence, tag and visibility."""
    data = RepoCard(card_text(files), ignore_metadata_errors=True).data.to_dict()
    named, other = data.get("license"), data.get("license_name")
    licence = ", ".join(map(str, named)) if isinstance(named, list) else str(named or "not stated")
    visibility = "private" if place.private else "a new repository as its owner's settings say"
    return [
        ("upload", f"{sum(each.size for each in files.values()):,} bytes in {len(files)} files, to {where}"),
        ("licence", f"{licence} ({other})" if other else licence),
        ("tag", place.tag or "none"),
        ("visibility", f"{visibility}; a repository that exists stays as it is"),
    ]


def summary(rows: list[tuple[str, str]]) -> str:
    """Return the end of a preview: names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n" + "".join(f"{name:<{width}}  {value}\n" for name, value in rows) + "Nothing was uploaded.\n"


def _preview(hub: Hub, folder: Path, place: Destination, files: Mapping[str, Content], checks: str) -> Iterator[str]:
    rows = upload_rows(place, f"{place.repository(hub).address}, branch {place.revision}", files)
    yield file_list(files)
    yield summary([*rows, ("checks", checks), ("card", str(write_card(folder, card_text(files))))])
