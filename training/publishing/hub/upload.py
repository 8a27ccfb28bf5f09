"""Uploads folders with a record: a packed model, a dataset release, or models as a family with a collection."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard

from training.common.errors import StoppedError, UserError
from training.common.hub import ATTRIBUTES, Content, check_repository, check_revision, same_files
from training.common.outputs import write_whole
from training.publishing.hub.hub import Hub, HubRepository
from training.publishing.record import RECORD, ModelRelease, changed_files, contents_of, load_release

logger = logging.getLogger("training")

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
    files = contents_of(folder)
    # The card and the record are read here: they are changed for the repository.
    files |= {name: Content((folder / name).read_bytes()) for name in (CARD, RECORD) if (folder / name).is_file()}
    if changed := next(changed_files(_record(files), files), None):
        raise UserError(f"{folder}: {changed} is not as {RECORD} says; pack the run, or release the data, again")
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


# Families


@dataclass(frozen=True)
class Member:
    """A packed model of a family. Its files are hashed once: what was checked is uploaded, or nothing."""

    folder: Path
    release: ModelRelease
    place: Destination
    contents: Mapping[str, Content]


def stage_links(release: ModelRelease, members: Mapping[str, ModelRelease]) -> dict[str, str]:
    """Return the repositories that the earlier stages of a release made, by the stage's name.

    Recipes use the same names, so all that is recorded of the stages is compared.
    """
    last = {repo: member.stages[-1] for repo, member in members.items() if member.stages}
    return {stage.name: repo for repo, stage in last.items() if stage in release.stages[:-1]}


def run_push_family(arguments: argparse.Namespace) -> int:
    """Upload a family, or show what would be uploaded. Return 1 if a member is missing in the end.

    Everything but tags is checked before the first write. After that, a member that fails does not keep the others
    back. A second time, this changes nothing.
    """
    # Loads torch, which push-data does not need.
    from training.publishing.card import model_card

    datasets = [check_repository(name, "--data") for name in arguments.data]
    found: dict[str, Member] = {}
    for folder in arguments.folders:
        release = load_release(folder)
        repo = check_repository(f"{arguments.org}/{release.name}", "--org")
        if repo in found:
            raise UserError(f"{folder}: would be {repo}, as {found[repo].folder} is; pack one under another --name")
        found[repo] = Member(folder, release, Destination.of(arguments, repo), recorded_files(folder))
    members = list(found.values())
    releases = {repo: member.release for repo, member in found.items()}
    if not arguments.no_verify:
        for member in members:
            check_packed(member.folder)

    def files_of(member: Member, collection: str) -> dict[str, Content]:
        others = {repo: release for repo, release in releases.items() if repo != member.place.repo}
        known = {"links": stage_links(member.release, releases), "datasets": datasets, "members": others}
        return with_card(member.contents, model_card(member.folder, member.place.repo, collection=collection, **known))

    if not arguments.dry_run:
        return _push(arguments, members, files_of)
    for member in members:
        # The Hub chooses the end of the collection's address when it is created.
        files = files_of(member, f"{arguments.org}/NOT-MADE-YET")
        sys.stdout.write(preview(Hub(), member.place, files) + write_card(member.folder, files) + "\n")
    sys.stdout.write(f"collection {arguments.collection!r} of {arguments.org}:\n")
    sys.stdout.writelines(f"{number}. {repo}\n" for number, repo in enumerate(releases, start=1))
    sys.stdout.write(NOTHING_UPLOADED)
    return 0


def _push(
    arguments: argparse.Namespace, members: Sequence[Member], files_of: Callable[[Member, str], dict[str, Content]]
) -> int:
    hub = Hub()
    for member in members:
        repo = member.place.repository(hub)
        if repo.check(member.place.private):
            check_replacement(repo, replace(member.place, tag=None), member.contents)
    # The cards link the collection, so it comes first.
    slug = create_collection(hub, arguments.org, arguments.collection, arguments.private)
    missing: dict[str, str] = {}
    for member in members:
        try:
            sys.stdout.write(upload(hub, member.place, files_of(member, slug)))
        except (UserError, StoppedError, OSError) as error:
            logger.info("%s: failed, going on with the others: %s", member.place.repo, error)
            missing[member.place.repo] = str(error)
    arrange_collection(hub, slug, [member.place.repo for member in members if member.place.repo not in missing])
    sys.stdout.write(f"collection: {hub.api.endpoint}/collections/{slug}\n")
    if missing:
        sys.stdout.write("missing, run the same command again to complete them:\n")
        sys.stdout.writelines(f"{repo}: {reason}\n" for repo, reason in missing.items())
    return 1 if missing else 0


def create_collection(hub: Hub, owner: str, title: str, private: bool) -> str:
    """Create the collection of an owner with a title if it does not exist; return its slug."""
    known = {"namespace": owner, "private": private, "exists_ok": True}
    found = hub.call(f"create collection {title!r}", partial(hub.api.create_collection, title, **known))
    if private and not found.private:
        raise UserError(f"collection {found.slug}: is public on the Hub already; give another --collection")
    return found.slug


def arrange_collection(hub: Hub, slug: str, repos: Sequence[str]) -> None:
    """Put models first in a collection, in this order, and other items behind."""

    def call(method: str, *arguments: Any, **options: Any) -> Any:
        what = f"{method.replace('_', ' ')} of {slug}"
        return hub.call(what, partial(getattr(hub.api, method), slug, *arguments, **options))

    def items() -> dict[str, str]:
        """Return the ids of the items by model, in the collection's order; a dataset may have the name of a model."""
        listed = ((each, each.item_object_id) for each in call("get_collection").items)
        return {each.item_id if each.item_type == "model" else item: item for each, item in listed}

    for position, repo in enumerate(repos):
        if repo not in items():
            call("add_collection_item", repo, "model", exists_ok=True)
        held = items()
        if list(held)[position] != repo:
            call("update_collection_item", held[repo], position=position)
