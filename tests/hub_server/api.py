"""The Hub's API of accounts, repositories, branches, tags, listings and collections."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.hub_server.routes import Answer, Call, json_answer, route
from tests.hub_server.store import Entry, Refused

_DATE = "2026-01-01T00:00:00.000Z"


@route("GET", "/api/whoami-v2")
def _whoami(call: Call) -> Answer:
    if call.account is None:
        raise Refused(401, "Invalid username or password.")
    role = "write" if call.account.may_write else "read"
    return json_answer(
        {
            "type": "user",
            "name": call.account.name,
            "orgs": [{"name": name, "roleInOrg": role} for name in call.account.organisations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }
    )


@route("POST", "/api/validate-yaml")
def _validate_yaml(call: Call) -> Answer:
    try:
        _card(call.json["content"])
    except yaml.YAMLError as error:
        return json_answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return json_answer({"errors": [], "warnings": []})


def _card(text: str) -> Any:
    """Return the metadata of a card; None if it has none."""
    parts = text.split("---\n")
    return yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else None


@route("POST", "/api/repos/create")
def _create(call: Call) -> Answer:
    wanted = call.json
    owner = wanted.get("organization") or (call.account.name if call.account else "")
    call.store.check_owner(owner, call.account)
    kind, name = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
    url = f"{call.address}/{'' if kind == 'model' else 'datasets/'}{name}"
    if (kind, name) in call.store.repositories:
        return json_answer({"error": f"You already created this {kind} repo", "url": url}, 409)
    call.store.create(kind, name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return json_answer({"url": url, "name": name, "id": name})


@route("GET", "/api/{kinds}/{repo}/refs")
def _refs(call: Call) -> Answer:
    repository = call.readable()

    def listed(folder: str, refs: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": refs[name]} for name in sorted(refs)]

    branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
    return json_answer({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})


def _file(path: str, entry: Entry) -> dict[str, Any]:
    lfs = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.sha256 else {}
    return {"type": "file", "oid": entry.blob, "size": entry.size, "path": path, **lfs}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


@route("GET", "/api/{kinds}/{repo}/tree/{revision}(?:/{path})?")
def _tree(call: Call) -> Answer:
    tree = call.readable().find(call.parts["revision"]).tree
    root = f"{call.parts['path']}/" if call.parts["path"] else ""
    inside = {path: entry for path, entry in tree.items() if path.startswith(root)}
    if not inside:
        raise Refused(404, f"{root} does not exist", "EntryNotFound")
    recursive, listed = call.query.get("recursive", ["false"])[0].lower() in ("true", "1"), {}
    for path, entry in inside.items():
        parts = path[len(root) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = root + "/".join(parts[:depth])
            listed[folder] = _folder(folder)
        if recursive or len(parts) == 1:
            listed[path] = _file(path, entry)
    entries, start = [listed[path] for path in sorted(listed)], int(call.query.get("cursor", ["0"])[0])
    end, more = start + call.page_size, {}
    if len(entries) > end:
        more = {"Link": f'<{call.address}{call.path}?recursive={recursive}&cursor={end}>; rel="next"'}
    return json_answer(entries[start:end], **more)


@route("POST", "/api/{kinds}/{repo}/branch/{branch}")
def _create_branch(call: Call) -> Answer:
    repository, branch = call.writable(), call.parts["branch"]
    if branch in repository.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    repository.move(branch, repository.find(call.json.get("startingPoint", "main")).id)
    return Answer()


@route("DELETE", "/api/{kinds}/{repo}/branch/{branch}")
def _delete_branch(call: Call) -> Answer:
    if call.parts["branch"] == "main":
        raise Refused(403, "The main branch cannot be deleted")
    if call.writable().branches.pop(call.parts["branch"], None) is None:
        raise Refused(404, f"Invalid rev id: {call.parts['branch']}", "RevisionNotFound")
    return Answer()


@route("POST", "/api/{kinds}/{repo}/tag/{revision}")
def _create_tag(call: Call) -> Answer:
    repository, tag = call.writable(), call.json["tag"]
    if tag in repository.tags:
        raise Refused(409, f"Tag already exists: {tag}")
    repository.tags[tag] = repository.find(call.parts["revision"]).id
    repository.moves.append((tag, repository.tags[tag]))
    return Answer()


@route("DELETE", "/api/{kinds}/{repo}/tag/{tag}")
def _delete_tag(call: Call) -> Answer:
    if call.writable().tags.pop(call.parts["tag"], None) is None:
        raise Refused(404, f"Invalid rev id: {call.parts['tag']}", "RevisionNotFound")
    return Answer()


# Last of the repositories' routes: the name of a repository may hold any part of their paths.
@route("GET", "/api/{kinds}/{repo}(?:/revision/{revision})?")
def _info(call: Call) -> Answer:
    repository = call.readable()
    commit, siblings = repository.find(call.parts["revision"] or "main"), []
    for path, entry in sorted(commit.tree.items()):
        lfs = {"lfs": {"sha256": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.sha256 else {}
        siblings.append({"rfilename": path, "size": entry.size, "blobId": entry.blob, **lfs})
    card = commit.tree.get("README.md")
    return json_answer(
        {
            **{"_id": "0", "id": repository.name, "author": repository.name.split("/")[0], "sha": commit.id},
            **{"private": repository.private, "gated": False, "disabled": False},
            **{"lastModified": _DATE, "createdAt": _DATE, "downloads": 0, "likes": 0, "tags": []},
            "cardData": _card(repository.content(card).decode()) if card else None,
            "siblings": siblings,
        }
    )


@route("GET", "/api/collections")
def _list_collections(call: Call) -> Answer:
    shown = [each for each in call.store.collections.values() if each["owner"] in call.query["owner"]]
    visible = [each for each in shown if not each["private"] or (call.account and call.account.owns(each["owner"]))]
    # A list shows the first four items of a collection only.
    return json_answer([{**each, "items": each["items"][:4]} for each in visible])


@route("POST", "/api/collections")
def _create_collection(call: Call) -> Answer:
    owner, title = call.json["namespace"], call.json["title"]
    call.store.check_owner(owner, call.account)
    collections = call.store.collections
    for each in collections.values():
        if (each["owner"], each["title"]) == (owner, title):
            return json_answer({"error": "Collection already exists", "slug": each["slug"]}, 409)
    slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}-{len(collections) + 1:024x}"
    collections[slug] = {
        **{"slug": slug, "title": title, "owner": owner, "private": call.json.get("private", False)},
        **{"description": None, "items": [], "lastUpdated": _DATE, "theme": "blue", "upvotes": 0},
    }
    return json_answer({**collections[slug], "position": 0})


def _collection(call: Call, write: bool = False) -> dict[str, Any]:
    found = call.store.collections.get(f"{call.parts['owner']}/{call.parts['slug']}")
    if found is None or (found["private"] and not (call.account and call.account.owns(found["owner"]))):
        raise Refused(404, "Collection not found", "CollectionNotFound")
    if write:
        call.store.check_owner(found["owner"], call.account)
    return found


@route("GET", "/api/collections/{owner}/{slug}")
def _get_collection(call: Call) -> Answer:
    return json_answer({**_collection(call), "position": 0})


@route("POST", "/api/collections/{owner}/{slug}/items")
def _add_item(call: Call) -> Answer:
    collection, item = _collection(call, write=True), call.json["item"]
    call.store.readable(item["type"], item["id"], call.account)
    if any((each["type"], each["id"]) == (item["type"], item["id"]) for each in collection["items"]):
        raise Refused(409, "The item is in the collection already")
    number = len(collection["items"])
    collection["items"].append({"_id": f"{number + 1:024x}", **item, "position": number})
    return json_answer({**collection, "position": 0})


@route("PATCH", "/api/collections/{owner}/{slug}/items/{item}")
def _move_item(call: Call) -> Answer:
    items = _collection(call, write=True)["items"]
    item = next((each for each in items if each["_id"] == call.parts["item"]), None)
    if item is None:
        raise Refused(404, "Item not found", "ItemNotFound")
    items.remove(item)
    items.insert(call.json["position"], item)
    for position, each in enumerate(items):
        each["position"] = position
    return json_answer({"success": True})
