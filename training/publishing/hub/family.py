"""Uploads several packed models as a family: cards that link each other, and a collection in order."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from training.common.errors import StoppedError, UserError
from training.common.hub import Content, check_repository
from training.publishing.card import model_card
from training.publishing.hub.hub import Hub
from training.publishing.hub.upload import (
    NOTHING_UPLOADED,
    Destination,
    check_packed,
    check_replacement,
    preview,
    recorded_files,
    upload,
    with_card,
    write_card,
)
from training.publishing.record import ModelRelease, load_release

logger = logging.getLogger("training")


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
    datasets = [check_repository(name, "--data") for name in arguments.data]
    members, hub = _members(arguments), Hub()
    releases = {member.place.repo: member.release for member in members}
    if not arguments.no_verify:
        for member in members:
            check_packed(member.folder)

    def files_of(member: Member, collection: str) -> dict[str, Content]:
        others = {repo: release for repo, release in releases.items() if repo != member.place.repo}
        known = {"links": stage_links(member.release, releases), "datasets": datasets, "members": others}
        return with_card(member.contents, model_card(member.folder, member.place.repo, collection=collection, **known))

    if not arguments.dry_run:
        return _push(arguments, members, hub, files_of)
    for member in members:
        # The Hub chooses the end of the collection's address when it is created.
        files = files_of(member, f"{arguments.org}/NOT-MADE-YET")
        sys.stdout.write(preview(hub, member.place, files) + write_card(member.folder, files) + "\n")
    sys.stdout.write(f"collection {arguments.collection!r} of {arguments.org}:\n")
    sys.stdout.writelines(f"{number}. {repo}\n" for number, repo in enumerate(releases, start=1))
    sys.stdout.write(NOTHING_UPLOADED)
    return 0


def _push(
    arguments: argparse.Namespace,
    members: Sequence[Member],
    hub: Hub,
    files_of: Callable[[Member, str], dict[str, Content]],
) -> int:
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


def _members(arguments: argparse.Namespace) -> list[Member]:
    members: dict[str, Member] = {}
    for folder in arguments.folders:
        release = load_release(folder)
        repo = check_repository(f"{arguments.org}/{release.name}", "--org")
        if repo in members:
            raise UserError(f"{folder}: would be {repo}, as {members[repo].folder} is; pack one under another --name")
        members[repo] = Member(folder, release, Destination.of(arguments, repo), recorded_files(folder))
    return list(members.values())


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
