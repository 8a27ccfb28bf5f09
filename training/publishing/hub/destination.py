"""Where a folder is uploaded to, and the upload: what holds for models and datasets alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from training.common.content import ATTRIBUTES, Content, RemoteFile, same_files
from training.common.errors import UserError
from training.common.hub_names import check_repository, check_revision
from training.publishing.hub.hub import Hub

# What a repository may hold and still count as empty: the Hub makes them for a repository that is made on its site.
INCIDENTAL = {ATTRIBUTES, "README.md", "LICENSE"}

# Says why what a revision holds, given by its files and its record, must not be replaced; None if it may.
Objection = Callable[[Mapping[str, RemoteFile], "bytes | None"], "str | None"]


@dataclass(frozen=True)
class Destination:
    """A revision of a repository.

    Attributes:
        repo: ``ORG/NAME``.
        kind: ``model`` or ``dataset``.
        revision: Branch that is written to.
        tag: Of the commit; None for no tag.
        private: Whether a new repository is private; as its owner's settings say if None.
        replace: Whether something else may be replaced, and a tag be taken from another commit.
    """

    repo: str
    kind: str
    revision: str = "main"
    tag: str | None = None
    private: bool | None = None
    replace: bool = False


def add_destination_arguments(parser: argparse.ArgumentParser, what: str, folder: str) -> None:
    """Adds what the commands that upload one folder take; ``what`` is in it, which ``folder`` says for the help."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help=folder)
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the Hub, made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--tag", help="tag the commit, such as v1.0")
    parser.add_argument("--revision", default="main", help="branch to write to (%(default)s)")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument(
        "--replace", action="store_true", help=f"even if the repository holds another {what}, or the tag another commit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be uploaded, and write the card beside FOLDER; needs no login",
    )


def destination(arguments: argparse.Namespace, kind: str) -> Destination:
    """The destination that a command line gives.

    Raises:
        UserError: If a name is none.
    """
    return Destination(
        repo=check_repository(arguments.repo),
        kind=kind,
        revision=check_revision("--revision", arguments.revision),
        tag=None if arguments.tag is None else check_revision("--tag", arguments.tag),
        private=arguments.private or None,
        replace=arguments.replace,
    )


def recorded_files(
    folder: Path, record: str, sizes: Mapping[str, int], hashes: Mapping[str, str], again: str
) -> dict[str, Content]:
    """The files of a folder, which must be those that its record lists.

    Hidden files are left where they are.

    Args:
        folder: The folder.
        record: Name of the record, which does not list itself.
        sizes: Bytes of the other files by path, as the record has them.
        hashes: SHA-256 of the same files likewise.
        again: What to do if they differ, for messages.

    Raises:
        UserError: If a file is missing, is there besides, or has another content.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        path: Content(file)
        for path, file in paths.items()
        if path != record and not path.startswith(".") and "/." not in path
    }
    found = {path: content.size for path, content in files.items()}
    changed = sorted(path for path in {*sizes, *found} if sizes.get(path) != found.get(path))
    # Sizes are compared first: hashing large files takes minutes.
    changed = changed or sorted(path for path, content in files.items() if content.sha256 != hashes.get(path))
    if changed:
        raise UserError(f"{folder}: {changed[0]} is not as {record} says; {again}")
    return files


def upload(
    hub: Hub,
    place: Destination,
    files: Mapping[str, Content],
    *,
    record: str,
    objection: Objection,
    message: str,
) -> str:
    """Makes a revision hold exactly these files, tags it, and says what changed.

    Args:
        hub: The Hub.
        place: Where to.
        files: By path in the repository.
        record: Path of the record that tells what a repository holds.
        objection: Why what is there must not be replaced.
        message: Of the commit.

    Raises:
        UserError: If something else is there and may not be replaced, or the Hub refuses the upload.
        HubUnavailableError: If the Hub is down; the revision is then as it was, or whole.
    """
    hub.ensure_repo(place.repo, place.kind, place.private)
    before = hub.files(place.repo, place.revision, place.kind)
    check_replacement(hub, place, files, before, record=record, objection=objection)
    commit = hub.publish(place.repo, files, revision=place.revision, message=message, repo_type=place.kind)
    if place.tag is not None:
        hub.tag(place.repo, place.tag, commit, place.kind, replace=place.replace)
    after = hub.files(place.repo, commit, place.kind) or {}
    return _report(hub, place, commit, before or {}, after)


def check_replacement(
    hub: Hub,
    place: Destination,
    files: Mapping[str, Content],
    before: Mapping[str, RemoteFile] | None,
    *,
    record: str,
    objection: Objection,
) -> None:
    """Makes sure that an upload replaces nothing that it may not; ``before`` is what is there, None if nothing.

    Raises:
        UserError: If something else is there, or a tag is on other files.
        HubUnavailableError: If the Hub is down.
    """
    if not place.replace:
        _check_held(hub, place, "main" if before is None else place.revision, record, objection)
        _check_tag(hub, place, files)


def _check_held(hub: Hub, place: Destination, revision: str, record: str, objection: Objection) -> None:
    """What is at the revision, or at ``main`` where a new one starts, must be the same model or dataset."""
    held = hub.files(place.repo, revision, place.kind) or {}
    if {*held} <= INCIDENTAL:
        return
    found = hub.read(place.repo, record, revision, place.kind) if record in held else None
    reason = objection(held, found)
    if reason:
        raise UserError(f"{place.repo} at {revision}: {reason}; give another repository, or --replace to replace it")


def _check_tag(hub: Hub, place: Destination, files: Mapping[str, Content]) -> None:
    """Found before the upload: a tag that is on a commit of other content."""
    held = None if place.tag is None else hub.repository(place.repo, place.kind).tagged(place.tag)
    if held is None:
        return
    if not same_files(files, hub.files(place.repo, held, place.kind) or {}):
        raise UserError(
            f"{place.repo}: tag {place.tag} is on commit {held[:12]}, which holds other files; give another --tag, "
            "or --replace to move it"
        )


def _report(
    hub: Hub, place: Destination, commit: str, before: Mapping[str, RemoteFile], after: Mapping[str, RemoteFile]
) -> str:
    added = len({*after} - {*before} - {ATTRIBUTES})
    changed = sum(path in before and before[path] != file for path, file in after.items())
    removed = len({*before} - {*after})
    if added or changed or removed:
        what = f"{added} files added, {changed} changed, {removed} removed"
    else:
        what = "nothing to change"
    tag = f", tag {place.tag}" if place.tag else ""
    where = f"{place.revision} at commit {commit[:12]}{tag}"
    return f"{hub.address(place.repo, place.kind)}: {what}; {where}"
