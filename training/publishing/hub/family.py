"""Uploads several packed models as a family: a collection of them, and cards that link each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.common.content import Content
from training.common.errors import StoppedError, UserError
from training.common.hub_names import check_repository
from training.publishing.card import model_card
from training.publishing.hub.collection import HubCollection
from training.publishing.hub.destination import Destination, check_replacement
from training.publishing.hub.hub import Hub
from training.publishing.hub.push import other_model, packed_contents, packed_files, push_model
from training.publishing.record import RECORD, ModelRelease, load_release

logger = logging.getLogger("training")


@dataclass(frozen=True)
class Family:
    """Packed models that are released together.

    Attributes:
        organisation: User or organisation that they are released by.
        title: Of their collection.
        folders: Packed folders by repository, in the order of the collection.
        releases: Their records by repository.
        datasets: Data sets on the Hub for their cards.
    """

    organisation: str
    title: str
    folders: Mapping[str, Path]
    releases: Mapping[str, ModelRelease]
    datasets: Sequence[str] = ()
    _contents: dict[str, dict[str, Content]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def contents(self, repository: str) -> dict[str, Content]:
        """The files of a member, hashed once: those that were checked are uploaded, or none."""
        if repository not in self._contents:
            self._contents[repository] = packed_contents(self.folders[repository])
        return self._contents[repository]

    def card(self, repository: str, collection: str | None) -> str:
        """The card of a member, which links the others and the collection, given by its slug if it is known."""
        own = self.releases[repository]
        return model_card(
            self.folders[repository],
            repository,
            links=self._stages(own),
            datasets=self.datasets,
            collection=collection,
            members={name: release for name, release in self.releases.items() if name != repository},
        )

    def files(self, repository: str, collection: str | None, check: bool) -> dict[str, Content]:
        """The files of a member as they are uploaded, as :func:`~.push.packed_files` has them."""
        folder, contents = self.folders[repository], self.contents(repository)
        # The folder is examined before its card is written.
        packed_files(folder, repository, check=check, contents=contents)
        card = self.card(repository, collection)
        return packed_files(folder, repository, card=card, check=False, contents=contents)

    def _stages(self, release: ModelRelease) -> dict[str, str]:
        """Members by the names of the stages that made them, for the stages of a release.

        Recipes use the same names: only a stage that is the same in all it records is taken for the member's.
        """
        return {
            member.stages[-1].name: repository
            for repository, member in self.releases.items()
            if member.stages and member.stages[-1] in release.stages[:-1]
        }


@dataclass
class FamilyReport:
    """What a release of a family came to.

    Attributes:
        done: What changed, a line of each member that is done.
        missing: What failed, by repository.
        collection: Slug of the collection.
        arranged: Whether the collection was changed.
    """

    done: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    collection: str = ""
    arranged: bool = False


def load_family(folders: Sequence[Path], organisation: str, title: str, datasets: Sequence[str] = ()) -> Family:
    """Reads the records of packed folders; each goes to the repository of its name.

    Raises:
        UserError: If a folder is not packed, or two have one name.
    """
    places: dict[str, Path] = {}
    releases = {}
    for folder in folders:
        release = load_release(folder)
        repository = check_repository(f"{organisation}/{release.name}", "--org")
        # The Hub takes names that differ in case alone for one.
        for other, place in places.items():
            if other.lower() == repository.lower():
                raise UserError(f"{folder}: would be {repository}, as {place} is; pack one under another --name")
        places[repository], releases[repository] = folder, release
    return Family(organisation, title, places, releases, tuple(datasets))


def push_family(family: Family, hub: Hub, places: Mapping[str, Destination], *, check: bool = True) -> FamilyReport:
    """Makes the repositories and the collection, and uploads the members; run twice, it changes nothing.

    Everything is checked before the first write. Then a member that fails does not keep the others back.

    Args:
        family: The models.
        hub: The Hub.
        places: Where each goes, by repository.
        check: Whether the folders must pass the checks that take a moment.

    Raises:
        UserError: If a folder has a fault, or a repository or the collection may not be written; nothing is changed
            then.
        HubUnavailableError: If the Hub is down before the collection is made; the next run goes on from there.
    """
    collection = HubCollection(hub, family.organisation, family.title)
    _check(family, hub, places, collection, check)
    report = FamilyReport()
    for repository, place in places.items():
        _attempt(report, repository, lambda place=place: hub.ensure_repo(place.repo, place.kind, place.private))
    made = [repository for repository in places if repository not in report.missing]
    if not made:
        raise StoppedError(f"none of the repositories could be made; {next(iter(report.missing.values()))}")
    # The cards link the collection: it must be there first, and a public one must not name what is private.
    private = any(getattr(hub.repository(repository).info(), "private", False) for repository in made)
    report.collection = collection.ensure(private)
    report.arranged = collection.arrange(report.collection, made)
    for repository in made:

        def push(repository: str = repository) -> None:
            card = family.card(repository, report.collection)
            folder, contents = family.folders[repository], family.contents(repository)
            line = push_model(folder, places[repository], hub, card=card, check=False, contents=contents)
            report.done.append(line)

        _attempt(report, repository, push)
    return report


def _attempt(report: FamilyReport, repository: str, work: Callable[[], None]) -> None:
    try:
        work()
    except (UserError, StoppedError, OSError) as error:
        logger.info("%s: failed, going on with the others: %s", repository, error)
        report.missing[repository] = str(error)


def _check(family: Family, hub: Hub, places: Mapping[str, Destination], collection: HubCollection, check: bool) -> None:
    """All that can be known before the first write; here nothing is written."""
    for repository in places:
        contents = family.contents(repository)
        packed_files(family.folders[repository], repository, check=check, contents=contents)
    _check_writer(hub, family.organisation)
    slug = collection.slug()
    if any(place.private for place in places.values()):
        collection.check_private()
    for repository, place in places.items():
        if hub.check_repo(repository, place.kind, place.private):
            files = family.files(repository, slug, check=False)
            before = hub.files(repository, place.revision, place.kind)
            objection = other_model(family.releases[repository])
            check_replacement(hub, place, files, before, record=RECORD, objection=objection)


def _check_writer(hub: Hub, organisation: str) -> None:
    """Makes sure that the login may write, as far as the Hub tells.

    Raises:
        UserError: If it is a login that only reads, or one of somebody who is not of the organisation.
        HubUnavailableError: If the Hub is down.
    """
    login = hub.login()
    if login.token_role == "read":
        raise UserError("the login may only read; run `hf auth login --force` with a token that may write")
    owners = {login.name: "admin", **login.roles}
    # A token of chosen rights may write where it is not told to belong.
    if login.token_role == "write" and (organisation not in owners or owners[organisation] == "read"):
        raise UserError(f"--org {organisation}: {login.name}, who is logged in, may not write there; give another")
