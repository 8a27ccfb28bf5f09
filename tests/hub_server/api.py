"""The Hub's API: accounts, repositories, branches, tags, listings, uploads, commits, downloads and collections."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import yaml

from tests.hub_server.store import Refused, Store

_DATE = "2026-01-01T00:00:00.000Z"
_LARGE = re.compile(r"\.(safetensors|parquet|npz|npy|bin|png|jpg|gz|zip|arrow|onnx)$")
_PARTS = {"kinds": "models|datasets", "prefix": "(?:datasets/)?", "repo": "[^/]+/[^/]+?", "path": ".*"}
_ROUTES = []


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


def json_answer(content, status=200, **headers):
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


@dataclass
class Call:
    """A request, the unquoted parts of its path that the route names, and the names that its token may write to."""

    store: Store
    address: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    owned: tuple[str, ...]
    parts: dict[str, str]

    @property
    def json(self):
        return json.loads(self.body or b"{}")

    @property
    def kind(self):
        """Of the repository: ``models`` of an API path, or the prefix of a page."""
        return (self.parts.get("kinds") or self.parts.get("prefix", "").rstrip("/") or "models").removesuffix("s")

    def readable(self):
        return self.store.readable(self.kind, self.parts["repo"], self.owned)

    def writable(self):
        repository = self.readable()
        self.store.check_owner(repository.name.split("/")[0], self.owned)
        return repository


def route(methods, pattern):
    """Register a function for a path; ``{kinds}``, ``{repo}``, … name its parts, and ``{path}`` may hold slashes."""
    regex = re.compile(re.sub(r"{(\w+)}", lambda m: f"(?P<{m[1]}>{_PARTS.get(m[1], '[^/]+')})", pattern))

    def register(function):
        _ROUTES.extend((method, regex, function) for method in methods.split())
        return function

    return register


def find_route(method, path):
    """Return the function of a path (still quoted), and the path's parts."""
    for known, pattern, function in _ROUTES:
        if known == method and (match := pattern.fullmatch(path)):
            return function, match.groupdict("")
    raise Refused(404, f"there is nothing at {method} {path}")


@route("GET", "/api/whoami-v2")
def _whoami(call):
    if not call.owned:
        raise Refused(401, "Invalid username or password.")
    return json_answer({"type": "user", "name": call.owned[0], "orgs": [{"name": each} for each in call.owned[1:]]})


@route("POST", "/api/validate-yaml")
def _validate_yaml(call):
    yaml.safe_load("".join(call.json["content"].split("---\n")[1:2]))
    return json_answer({"errors": [], "warnings": []})


# Repositories and their refs


@route("POST", "/api/repos/create")
def _create(call):
    wanted = call.json
    owner = wanted.get("organization") or "".join(call.owned[:1])
    call.store.check_owner(owner, call.owned)
    kind, name = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
    url = f"{call.address}/{'' if kind == 'model' else 'datasets/'}{name}"
    if (kind, name) in call.store.repositories:
        return json_answer({"error": f"You already created this {kind} repo", "url": url}, 409)
    call.store.create(kind, name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return json_answer({"url": url, "name": name, "id": name})


@route("GET", "/api/{kinds}/{repo}/refs")
def _refs(call):
    repository = call.readable()
    listed = {"converts": [], "pullRequests": []}
    for key, folder, refs in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags)):
        listed[key] = [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": refs[name]} for name in refs]
    return json_answer(listed)


@route("POST", "/api/{kinds}/{repo}/branch/{branch}")
def _create_branch(call):
    repository, branch = call.writable(), call.parts["branch"]
    if branch in repository.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    repository.move(branch, repository.find(call.json.get("startingPoint", "main")).id)
    return Answer()


@route("POST", "/api/{kinds}/{repo}/tag/{revision}")
def _create_tag(call):
    repository, tag = call.writable(), call.json["tag"]
    if tag in repository.tags:
        raise Refused(409, f"Tag already exists: {tag}")
    repository.tags[tag] = repository.find(call.parts["revision"]).id
    repository.moves.append((tag, repository.tags[tag]))
    return Answer()


@route("DELETE", "/api/{kinds}/{repo}/(?P<ref>branch|tag)/{name}")
def _delete_ref(call):
    repository = call.writable()
    refs = repository.branches if call.parts["ref"] == "branch" else repository.tags
    if refs.pop(call.parts["name"], None) is None:
        raise Refused(404, f"Invalid rev id: {call.parts['name']}", "RevisionNotFound")
    return Answer()


# Files


def _file(path, entry):
    lfs = {"lfs": {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}} if entry.sha256 else {}
    return {"type": "file", "oid": entry.blob, "size": entry.size, "path": path, **lfs}


@route("GET", "/api/{kinds}/{repo}/tree/{revision}(?:/{path})?")
def _tree(call):
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
            listed[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            listed[path] = _file(path, entry)
    return json_answer([listed[path] for path in sorted(listed)])


@route("POST", "/api/{kinds}/{repo}/preupload/{revision}")
def _preupload(call):
    tree, files = call.writable().find(call.parts["revision"]).tree, []
    for file in call.json["files"]:
        large, held = _LARGE.search(file["path"]) or b"\0" in b64decode(file["sample"]), tree.get(file["path"])
        listed = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append({**listed, "oid": held and (held.sha256 or held.blob)})
    return json_answer({"files": files, "commitOid": call.parts["revision"]})


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch")
def _batch(call):
    repository, objects = call.writable(), call.json["objects"]
    for each in objects:
        if each["oid"] not in repository.large:
            where = f"{call.address}/storage/{call.kind}s/{repository.name}"
            each["actions"] = {"upload": {"href": f"{where}/{each['oid']}"}}
    return json_answer({"transfer": "basic", "objects": objects})


# Signed addresses, as those of a storage service: they are used without a token.
@route("PUT", "/storage/{kinds}/{repo}/{sha256}")
def _store(call):
    if hashlib.sha256(call.body).hexdigest() != call.parts["sha256"]:
        raise Refused(400, "The content has another SHA-256 than its name says")
    call.store.repositories[call.kind, call.parts["repo"]].large[call.parts["sha256"]] = call.body
    return Answer(headers={"ETag": f'"{call.parts["sha256"]}"'})


@route("POST", "/api/{kinds}/{repo}/commit/{revision}")
def _commit(call):
    repository = call.writable()
    header, added, deleted = {}, {}, []
    for line in call.body.splitlines():
        key, value = (operation := json.loads(line))["key"], operation["value"]
        if key == "header":
            header = value
        elif key == "file":
            added[value["path"]] = repository.add_blob(b64decode(value["content"]))
        elif key == "lfsFile":
            added[value["path"]] = repository.large_entry(value["oid"])
        else:
            deleted.append(value["path"])
    branch = call.parts["revision"]
    commit = repository.commit(branch, header["summary"], added, deleted, header.get("parentCommit"))
    url = f"{call.address}/{repository.name}/commit/{commit.id}"
    return json_answer({"commitUrl": url, "commitOid": commit.id, "success": True})


@route("GET HEAD", "/{prefix}{repo}/resolve/{revision}/{path}")
def _resolve(call):
    repository = call.readable()
    commit = repository.find(call.parts["revision"])
    if (entry := commit.tree.get(call.parts["path"])) is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    content = repository.content(entry)
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    headers["ETag"] = f'"{entry.sha256 or entry.blob}"'
    if entry.sha256:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(entry.size)}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if not wanted:
        return Answer(200, content, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Answer(206, content[first : last + 1], headers)


# Last of the repositories' routes: the name of a repository may hold any part of their paths.
@route("GET", "/api/{kinds}/{repo}(?:/revision/{revision})?")
def _info(call):
    repository = call.readable()
    commit = repository.find(call.parts["revision"] or "main")
    told = {"_id": "0", "id": repository.name, "sha": commit.id, "private": repository.private, "tags": []}
    told |= {"lastModified": _DATE, "createdAt": _DATE, "downloads": 0, "likes": 0}
    return json_answer({**told, "siblings": [{"rfilename": path} for path in sorted(commit.tree)]})


# Collections


@route("POST", "/api/collections")
def _create_collection(call):
    owner, title, collections = call.json["namespace"], call.json["title"], call.store.collections
    call.store.check_owner(owner, call.owned)
    for each in collections.values():
        if (each["owner"], each["title"]) == (owner, title):
            return json_answer({"error": "Collection already exists", "slug": each["slug"]}, 409)
    slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}-{len(collections) + 1:024x}"
    collections[slug] = {
        **{"slug": slug, "title": title, "owner": owner, "private": call.json.get("private", False), "position": 0},
        **{"description": None, "items": [], "lastUpdated": _DATE, "theme": "blue", "upvotes": 0},
    }
    return json_answer(collections[slug])


def _collection(call):
    found = call.store.collections.get(f"{call.parts['owner']}/{call.parts['slug']}")
    if found is None:
        raise Refused(404, "Collection not found", "CollectionNotFound")
    call.store.check_owner(found["owner"], call.owned)
    return found


@route("GET", "/api/collections/{owner}/{slug}")
def _get_collection(call):
    return json_answer(_collection(call))


@route("POST", "/api/collections/{owner}/{slug}/items")
def _add_item(call):
    collection, item = _collection(call), call.json["item"]
    call.store.readable(item["type"], item["id"], call.owned)
    if any((each["type"], each["id"]) == (item["type"], item["id"]) for each in collection["items"]):
        raise Refused(409, "The item is in the collection already")
    number = len(collection["items"])
    collection["items"].append({"_id": f"{number + 1:024x}", **item, "position": number})
    return json_answer(collection)


@route("PATCH", "/api/collections/{owner}/{slug}/items/{item}")
def _move_item(call):
    items = _collection(call)["items"]
    item = next(each for each in items if each["_id"] == call.parts["item"])
    items.remove(item)
    items.insert(call.json["position"], item)
    for position, each in enumerate(items):
        each["position"] = position
    return json_answer({"success": True})
