"""Uploads several packed models as a family: cards that link each other, and a collection in order."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import Collection

from training.common.errors import StoppedError, UserError
from training.common.hub import Content, check_repository
from training.publishing.card import model_card
from training.publishing.hub import upload as uploads
from training.publishing.hub.hub import Hub
from training.publishing.hub.upload import Destination
from training.publishing.record import ModelRelease, load_release

logger = logging.getLogger("training")

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """A packed model of a family: its folder, its record, and where it is uploaded to.

    The files are hashed once: what was checked is uploaded, or nothing.
    """

    folder: Path
    release: ModelRelease
    place: Destination
    contents: Mapping[str, Content]


@dataclass(frozen=True)
class Family:
    """Packed models that are released together, in the order of their collection."""

    owner: str  # user or organisation
    title: str  # of the collection
    members: Sequence[Member]
    datasets: Sequence[str] = ()  # on the Hub, for the cards

    def files(self, member: Member, collection: str | None) -> dict[str, Content]:
        """Return the files of a member; its card links the others, and the collection if its slug is known."""
        card = model_card(
            member.folder,
            member.place.repo,
            links=stage_links(member.release, {each.place.repo: each.release for each in self.members}),
            datasets=self.datasets,
            collection=collection,
            members={each.place.repo: each.release for each in self.members if each is not member},
        )
        return uploads.with_card(member.contents, member.folder, card)


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
    family, hub = _family(arguments), Hub()
    if not arguments.no_verify:
        for member in family.members:
            uploads.check_packed(member.folder)
    if arguments.dry_run:
        sys.stdout.writelines(_preview(family, hub))
        return 0
    for member in family.members:
        repo = member.place.repository(hub)
        if repo.check(member.place.private):
            uploads.check_replacement(repo, replace(member.place, tag=None), {}, uploads.other_model(member.release))
    # The cards link the collection, so it comes first.
    collection = HubCollection(hub, family.owner, family.title)
    slug = collection.create(arguments.private).slug
    missing: dict[str, str] = {}

    def attempt(member: Member, work: Callable[[], None]) -> None:
        try:
            work()
        except (UserError, StoppedError, OSError) as error:
            logger.info("%s: failed, going on with the others: %s", member.place.repo, error)
            missing[member.place.repo] = str(error)

    def push(member: Member) -> None:
        conflict, message = uploads.other_model(member.release), f"Release {member.release.name}"
        sys.stdout.write(uploads.upload(hub, member.place, family.files(member, slug), conflict, message))

    for member in family.members:
        attempt(member, partial(member.place.repository(hub).ensure, member.place.private))
    made = [member for member in family.members if member.place.repo not in missing]
    collection.arrange(slug, [member.place.repo for member in made])
    for member in made:
        attempt(member, partial(push, member))
    sys.stdout.write(f"collection: {hub.api.endpoint}/collections/{slug}\n")
    if missing:
        sys.stdout.write("missing, run the same command again to complete them:\n")
        sys.stdout.writelines(f"{repo}: {reason}\n" for repo, reason in missing.items())
    return 1 if missing else 0


def _family(arguments: argparse.Namespace) -> Family:
    members: dict[str, Member] = {}
    for folder in arguments.folders:
        release = load_release(folder)
        repo = check_repository(f"{arguments.org}/{release.name}", "--org")
        if repo in members:
            raise UserError(f"{folder}: would be {repo}, as {members[repo].folder} is; pack one under another --name")
        members[repo] = Member(folder, release, Destination.of(arguments, repo), uploads.packed_contents(folder))
    datasets = [check_repository(name, "--data") for name in arguments.data]
    return Family(arguments.org, arguments.collection, list(members.values()), datasets)


def _preview(family: Family, hub: Hub) -> Iterator[str]:
    for member in family.members:
        # The Hub chooses the end of the collection's address when it is created.
        files = family.files(member, f"{family.owner}/NOT-MADE-YET")
        yield uploads.preview(hub, member.place, files) + uploads.write_card(member.folder, files) + "\n"
    yield f"collection {family.title!r} of {family.owner}:\n"
    yield from (f"{number}. {member.place.repo}\n" for number, member in enumerate(family.members, start=1))
    yield uploads.NOTHING_UPLOADED


@dataclass(frozen=True)
class HubCollection:
    """The collection of an owner with a title, whether it exists or not."""

    hub: Hub
    owner: str
    title: str

    def _call(self, what: str, work: Callable[[], T]) -> T:
        return self.hub.retries.call(f"{what} the collection {self.title!r} of {self.owner}", work)

    def create(self, private: bool) -> Collection:
        """Create the collection if it does not exist."""
        known = {"namespace": self.owner, "private": private, "exists_ok": True}
        collection = self._call("making", partial(self.hub.api.create_collection, self.title, **known))
        if private and not collection.private:
            raise UserError(
                f"collection {collection.slug}: is public on the Hub already; make it private there, give another "
                "--collection, or leave out --private"
            )
        return collection

    def arrange(self, slug: str, repos: Sequence[str]) -> None:
        """Put models first in the collection, in this order, and other items behind."""
        api, held = self.hub.api, self._items(slug)
        for repo in repos:
            if repo not in held:
                self._call("adding to", partial(api.add_collection_item, slug, repo, "model", exists_ok=True))
        items = self._items(slug)
        order = list(items)
        for position, repo in enumerate(repos):
            if order[position] != repo:
                self._call("arranging", partial(api.update_collection_item, slug, items[repo], position=position))
                order.remove(repo)
                order.insert(position, repo)

    def _items(self, slug: str) -> dict[str, str]:
        """Return the ids of the items by model, in the collection's order; a dataset may have the name of a model."""
        items = self._call("reading", lambda: self.hub.api.get_collection(slug)).items
        return {
            each.item_id if each.item_type == "model" else each.item_object_id: each.item_object_id for each in items
        }
