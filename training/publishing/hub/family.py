"""Uploads several packed models as a family: cards that link each other, and a collection in order."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import Collection

from training.common.errors import StoppedError, UserError
from training.common.hub import Content, check_repository
from training.publishing.card import model_card
from training.publishing.hub import upload as uploads
from training.publishing.hub.hub import Hub
from training.publishing.hub.upload import CARD, Destination, card_text
from training.publishing.record import ModelRelease, load_release

logger = logging.getLogger("training")

T = TypeVar("T")

# Characters of a collection's title that the Hub takes.
_LONGEST_TITLE = 60


@dataclass(frozen=True)
class Member:
    """A packed model of a family: its folder, its record, and where it is uploaded to."""

    folder: Path
    release: ModelRelease
    place: Destination

    @cached_property
    def contents(self) -> dict[str, Content]:
        """The packed files, hashed once: what was checked is uploaded, or nothing."""
        return uploads.packed_contents(self.folder)


@dataclass(frozen=True)
class Family:
    """Packed models that are released together.

    Attributes:
        owner: User or organisation that releases them.
        title: Title of their collection.
        members: In the order of the collection.
        datasets: Datasets on the Hub for their cards.
    """

    owner: str
    title: str
    members: Sequence[Member]
    datasets: Sequence[str] = ()

    def files(self, member: Member, collection: str | None) -> dict[str, Content]:
        """Return the files of a member; its card links the others, and the collection if its slug is known."""
        card = model_card(
            member.folder,
            member.place.repo,
            links=stage_links(member.release, self.members),
            datasets=self.datasets,
            collection=collection,
            members={each.place.repo: each.release for each in self.members if each is not member},
        )
        return uploads.with_card(member.contents, member.folder, card)


def stage_links(release: ModelRelease, members: Sequence[Member]) -> dict[str, str]:
    """Return the members that the earlier stages of a release made, by the stage's name.

    Recipes use the same names, so all that is recorded of the stages is compared.
    """
    last = {member.place.repo: member.release.stages[-1] for member in members if member.release.stages}
    return {stage.name: repo for repo, stage in last.items() if stage in release.stages[:-1]}


def run_push_family(arguments: argparse.Namespace) -> int:
    """Upload a family, or show what would be uploaded. Return 1 if a member is missing in the end.

    Everything is checked before the first write. After that, a member that fails does not keep the others back. A
    second time, this changes nothing.
    """
    family, hub, check = _family(arguments), Hub(), not arguments.no_verify
    for member in family.members:
        _ = member.contents
        if check:
            uploads.check_packed(member.folder)
    if arguments.dry_run:
        sys.stdout.writelines(_preview(family, hub, uploads.checks_line(check)))
        return 0
    collection = HubCollection(hub, family.owner, family.title)
    found = collection.find()
    _check(family, hub, found)
    missing: dict[str, str] = {}

    def attempt(member: Member, work: Callable[[], None]) -> None:
        try:
            work()
        except (UserError, StoppedError, OSError) as error:
            logger.info("%s: failed, going on with the others: %s", member.place.repo, error)
            missing[member.place.repo] = str(error)

    for member in family.members:
        attempt(member, partial(member.place.repository(hub).ensure, member.place.private))
    made = [member for member in family.members if member.place.repo not in missing]
    if not made:
        raise StoppedError(f"none of the repositories could be made; {next(iter(missing.values()))}")
    # The cards link the collection, so it comes first. A public one must not list private models.
    private = any(getattr(member.place.repository(hub).info(), "private", False) for member in made)
    slug = (found or collection.create(private)).slug
    changed = collection.arrange(slug, [member.place.repo for member in made])

    def push(member: Member) -> None:
        conflict, message = uploads.other_model(member.release), f"Release {member.release.name}"
        report = uploads.upload(hub, member.place, family.files(member, slug), conflict, message)
        sys.stdout.write(f"{report}\n")

    for member in made:
        attempt(member, partial(push, member))
    sys.stdout.write(f"{hub.api.endpoint}/collections/{slug}: {'updated' if changed else 'nothing to change'}\n")
    if missing:
        sys.stdout.write("missing, run the same command again to complete them:\n")
        sys.stdout.writelines(f"{repo}: {reason}\n" for repo, reason in missing.items())
    return 1 if missing else 0


def _family(arguments: argparse.Namespace) -> Family:
    title = arguments.collection.strip()
    if not 0 < len(title) <= _LONGEST_TITLE:
        raise UserError(f"--collection {arguments.collection!r}: give a title of 1 to {_LONGEST_TITLE} characters")
    members: dict[str, Member] = {}
    for folder in arguments.folders:
        release = load_release(folder)
        repo = check_repository(f"{arguments.org}/{release.name}", "--org")
        # The Hub ignores case in names.
        other = members.get(repo.lower())
        if other:
            raise UserError(f"{folder}: would be {repo}, as {other.folder} is; pack one under another --name")
        place = Destination(repo, tag=arguments.tag, private=arguments.private or None, replace=arguments.replace)
        members[repo.lower()] = Member(folder, release, place)
    datasets = [check_repository(name, "--data") for name in arguments.data]
    return Family(arguments.org, title, list(members.values()), datasets)


def _preview(family: Family, hub: Hub, checks: str) -> Iterator[str]:
    rows = []
    for member in family.members:
        # The Hub chooses the end of the collection's address when it is created.
        place, files = member.place, family.files(member, f"{family.owner}/NOT-MADE-YET")
        before, after = (member.folder / CARD).read_text(encoding="utf-8").splitlines(), card_text(files).splitlines()
        yield f"{place.repo}:\n{uploads.file_list(files)}\n"
        yield from (f"{line}\n" for line in unified_diff(before, after, CARD, f"{place.repo}/{CARD}", lineterm=""))
        yield "\n"
        rows += uploads.upload_rows(place, f"{place.repository(hub).address}, branch {place.revision}", files)
        rows.append(("card", str(uploads.write_card(member.folder, card_text(files)))))
    yield f"collection {family.title!r} of {family.owner}:\n"
    yield from (f"{number}. {member.place.repo}\n" for number, member in enumerate(family.members, start=1))
    yield uploads.summary([*rows, ("checks", checks)])


def _check(family: Family, hub: Hub, found: Collection | None) -> None:
    check_writer(hub, family.owner)
    if found is not None and not found.private and any(member.place.private for member in family.members):
        raise UserError(
            f"collection {found.slug}: is public on the Hub already; make it private there, give another "
            "--collection, or leave out --private"
        )
    for member in family.members:
        repo = member.place.repository(hub)
        if repo.check(member.place.private):
            files = family.files(member, found and found.slug)
            uploads.check_replacement(repo, member.place, files, uploads.other_model(member.release))


def check_writer(hub: Hub, owner: str) -> None:
    """Refuse a login that cannot write to a user or organisation, as far as the Hub says so."""
    login = hub.login()
    if login.token_role == "read":
        raise UserError("the login may only read; run `hf auth login --force` with a token that may write")
    # A fine-grained token may write to organisations that the Hub does not list.
    if login.token_role == "write" and {**login.roles, login.name: "admin"}.get(owner, "read") == "read":
        raise UserError(f"--org {owner}: {login.name}, who is logged in, may not write there; give another")


@dataclass(frozen=True)
class HubCollection:
    """The collection of an owner with a title, whether it exists or not."""

    hub: Hub
    owner: str
    title: str

    def _call(self, what: str, work: Callable[[], T]) -> T:
        return self.hub.retries.call(f"{what} the collection {self.title!r} of {self.owner}", work)

    def find(self) -> Collection | None:
        """Return the collection, with its first items only, or None if it does not exist."""
        listed = self._call("looking for", lambda: list(self.hub.api.list_collections(owner=self.owner)))
        return next((each for each in listed if each.title == self.title), None)

    def create(self, private: bool) -> Collection:
        """Create the collection, unless a lost answer has left it created."""
        known = {"namespace": self.owner, "private": private, "exists_ok": True}
        return self._call("making", partial(self.hub.api.create_collection, self.title, **known))

    def arrange(self, slug: str, repos: Sequence[str]) -> bool:
        """Put models first in the collection, in this order, and other items behind. Return whether this changed it."""
        api, items = self.hub.api, self._items(slug)
        missing = [repo for repo in repos if repo not in items]
        for repo in missing:
            self._call("adding to", partial(api.add_collection_item, slug, repo, "model", exists_ok=True))
        items = self._items(slug) if missing else items
        order, moved = list(items), False
        for position, repo in enumerate(repos):
            if order[position] != repo:
                self._call("arranging", partial(api.update_collection_item, slug, items[repo], position=position))
                order.remove(repo)
                order.insert(position, repo)
                moved = True
        return moved or bool(missing)

    def _items(self, slug: str) -> dict[str, str]:
        """Return the ids of the items by model, in the collection's order; a dataset may have the name of a model."""
        items = self._call("reading", lambda: self.hub.api.get_collection(slug)).items
        return {
            each.item_id if each.item_type == "model" else each.item_object_id: each.item_object_id for each in items
        }
