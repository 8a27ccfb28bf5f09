"""The Hub's API of collections."""

from __future__ import annotations

import re
from typing import Any

from tests.hub_server.messages import Answer, Call, Router, json_answer
from tests.hub_server.store import Missing, Refused

__all__ = ["Shelves"]


class Shelves:
    """The collections of a Hub, by slug."""

    def __init__(self) -> None:
        self.collections: dict[str, dict[str, Any]] = {}

    def add_routes(self, router: Router) -> None:
        for method, pattern, route in (
            ("GET", "/api/collections", self._list),
            ("POST", "/api/collections", self._create),
            ("GET", "/api/collections/{owner}/{slug}", lambda call: json_answer(self._find(call))),
            ("PATCH", "/api/collections/{owner}/{slug}", self._update),
            ("DELETE", "/api/collections/{owner}/{slug}", self._delete),
            ("POST", "/api/collections/{owner}/{slug}/items", self._add_item),
            ("PATCH", "/api/collections/{owner}/{slug}/items/{item}", self._update_item),
            ("DELETE", "/api/collections/{owner}/{slug}/items/{item}", self._delete_item),
        ):
            router.add(method, pattern)(route)

    def _find(self, call: Call, write: bool = False) -> dict[str, Any]:
        collection = self.collections.get(f"{call.parts['owner']}/{call.parts['slug']}")
        visible = collection and (
            not collection["private"] or (call.account and call.account.owns(collection["owner"]))
        )
        if collection is None or not visible:
            raise Missing("CollectionNotFound", "Collection not found")
        if write:
            call.store.check_owner(collection["owner"], call.account)
        return collection

    def _list(self, call: Call) -> Answer:
        owners = call.query.get("owner")
        listed = [each for each in self.collections.values() if owners is None or each["owner"] in owners]
        shown = [each for each in listed if not each["private"] or (call.account and call.account.owns(each["owner"]))]
        # A list shows the first four items of a collection only, and its order is the position.
        return json_answer(
            [
                {**{key: value for key, value in each.items() if key != "position"}, "items": each["items"][:4]}
                for each in shown
            ]
        )

    def _create(self, call: Call) -> Answer:
        wanted = call.json
        owner, title = wanted["namespace"], wanted["title"]
        call.store.check_owner(owner, call.account)
        if len(wanted.get("description") or "") > 150:
            raise Refused(400, "description must not be longer than 150 characters")
        same = [each for each in self.collections.values() if (each["owner"], each["title"]) == (owner, title)]
        if same:
            return json_answer({"error": "Collection already exists", "slug": same[0]["slug"]}, 409)
        number = f"{len(self.collections) + 1:024x}"
        slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}-{number}"
        self.collections[slug] = {
            "slug": slug,
            "title": title,
            "owner": owner,
            "description": wanted.get("description"),
            "private": wanted.get("private", False),
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": len(self.collections),
            "theme": "blue",
            "upvotes": 0,
        }
        return json_answer(self.collections[slug])

    def _update(self, call: Call) -> Answer:
        collection = self._find(call, write=True)
        collection |= call.json
        return json_answer({"success": True, "data": collection})

    def _delete(self, call: Call) -> Answer:
        del self.collections[self._find(call, write=True)["slug"]]
        return Answer()

    def _add_item(self, call: Call) -> Answer:
        collection, wanted = self._find(call, write=True), call.json
        item = wanted["item"]
        if item["type"] in ("model", "dataset", "space"):
            call.store.readable(item["type"], item["id"], call.account)
        if any((each["type"], each["id"]) == (item["type"], item["id"]) for each in collection["items"]):
            raise Refused(409, "The item is in the collection already")
        if len(wanted.get("note") or "") > 500:
            raise Refused(400, "note must not be longer than 500 characters")
        number = f"{len(collection['items']) + 1:024x}"
        note = {"note": {"text": wanted["note"], "html": wanted["note"]}} if "note" in wanted else {}
        collection["items"].append({"_id": number, **item, "position": len(collection["items"]), **note})
        return json_answer(collection)

    def _item(self, call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
        collection = self._find(call, write=True)
        for item in collection["items"]:
            if item["_id"] == call.parts["item"]:
                return collection, item
        raise Missing("ItemNotFound", "Item not found")

    def _update_item(self, call: Call) -> Answer:
        (collection, item), wanted = self._item(call), call.json
        if "note" in wanted:
            item["note"] = {"text": wanted["note"], "html": wanted["note"]}
        if "position" in wanted:
            collection["items"].remove(item)
            collection["items"].insert(wanted["position"], item)
            for position, each in enumerate(collection["items"]):
                each["position"] = position
        return json_answer({"success": True})

    def _delete_item(self, call: Call) -> Answer:
        collection, item = self._item(call)
        collection["items"].remove(item)
        return json_answer({"success": True})
