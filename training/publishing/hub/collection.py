"""Collections of the Hub: found or made by their title, and brought to an order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import Collection

from training.common.errors import UserError
from training.publishing.hub.hub import Hub

T = TypeVar("T")


@dataclass(frozen=True)
class HubCollection:
    """The collection of an owner that has a title, whether it exists or not.

    Attributes:
        hub: The Hub.
        owner: User or organisation.
        title: Of the collection.
    """

    hub: Hub
    owner: str
    title: str

    def slug(self) -> str | None:
        """The name in the collection's address; None if there is no such collection."""
        found = self._call("looking for", self._find)
        return found and found.slug

    def check_private(self) -> None:
        """Makes sure that a private family would not stand in a collection that is public.

        Raises:
            UserError: If the collection is public.
        """
        found = self._call("looking for", self._find)
        if found is not None and not found.private:
            raise UserError(
                f"collection {found.slug}: is public on the Hub already; make it private there, give another "
                "--collection, or leave out --private"
            )

    def ensure(self, private: bool) -> str:
        """Makes the collection if there is none, and returns its slug; ``private`` holds for a new one."""

        def ensure() -> Collection:
            # Looked for at each try: an answer that was lost leaves the collection made.
            return self._find() or self.hub.api.create_collection(
                self.title, namespace=self.owner, private=private, exists_ok=True
            )

        return self._call("making", ensure).slug

    def arrange(self, slug: str, repositories: Sequence[str]) -> bool:
        """Puts models first in the collection, in their order; what else is in it stays behind them, in its order.

        Args:
            slug: Of the collection.
            repositories: Models of the Hub, ``ORG/NAME``.

        Returns:
            Whether anything was changed.
        """
        held = self._items(slug)
        missing = [repository for repository in repositories if repository not in held]
        for repository in missing:
            self._add(slug, repository)
        if missing:
            held = self._items(slug)
        moved = False
        order = list(held)
        for position, repository in enumerate(repositories):
            if order.index(repository) != position:
                self._move(slug, held[repository], position)
                order.remove(repository)
                order.insert(position, repository)
                moved = True
        return moved or bool(missing)

    def _items(self, slug: str) -> dict[str, str]:
        """Ids of the entries by the names of the models, in the collection's order."""
        items = self._call("reading", lambda: self.hub.api.get_collection(slug)).items
        # A data set may have the name of a model.
        names = [item.item_id if item.item_type == "model" else item.item_object_id for item in items]
        return {name: item.item_object_id for name, item in zip(names, items, strict=True)}

    def _add(self, slug: str, repository: str) -> None:
        self._call("adding to", lambda: self.hub.api.add_collection_item(slug, repository, "model", exists_ok=True))

    def _move(self, slug: str, item: str, position: int) -> None:
        self._call("arranging", lambda: self.hub.api.update_collection_item(slug, item, position=position))

    def _find(self) -> Collection | None:
        listed = self.hub.api.list_collections(owner=self.owner)
        return next((each for each in listed if each.title == self.title), None)

    def _call(self, what: str, work: Callable[[], T]) -> T:
        return self.hub.patience.call(f"{what} the collection {self.title!r} of {self.owner}", work)
