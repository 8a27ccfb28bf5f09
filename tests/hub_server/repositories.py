"""The Hub's API of repositories: who am I, make, move, delete, settings, branches, tags, listings."""

from __future__ import annotations

from typing import Any

import yaml

from tests.hub_server.messages import Answer, Call, Router, json_answer
from tests.hub_server.store import Entry, Missing, Refused, Repository

__all__ = ["add_repository_routes"]

_DATE = "2026-01-01T00:00:00.000Z"


def add_repository_routes(router: Router, page_size: int = 1000) -> None:
    """``page_size``: entries of a tree that one answer lists."""
    for method, pattern, route in (
        ("GET", "/api/whoami-v2", _whoami),
        ("POST", "/api/validate-yaml", _validate_yaml),
        ("POST", "/api/repos/create", _create),
        ("POST", "/api/repos/move", _move),
        ("DELETE", "/api/repos/delete", _delete),
        ("GET", "/api/{kinds}", _list),
        ("PUT", "/api/{kinds}/{repo}/settings", _settings),
        ("GET", "/api/{kinds}/{repo}/auth-check", lambda call: json_answer({"name": call.readable().name})),
        ("GET", "/api/{kinds}/{repo}/refs", _refs),
        ("GET", "/api/{kinds}/{repo}/commits/{revision}", _commits),
        ("GET", "/api/{kinds}/{repo}/revision/{revision}", _info),
        ("GET", "/api/{kinds}/{repo}/tree/{revision}", lambda call: _tree(call, page_size)),
        ("GET", "/api/{kinds}/{repo}/tree/{revision}/{path}", lambda call: _tree(call, page_size)),
        ("POST", "/api/{kinds}/{repo}/paths-info/{revision}", _paths_info),
        ("POST", "/api/{kinds}/{repo}/branch/{branch}", _create_branch),
        ("DELETE", "/api/{kinds}/{repo}/branch/{branch}", _delete_branch),
        ("POST", "/api/{kinds}/{repo}/tag/{revision}", _create_tag),
        ("DELETE", "/api/{kinds}/{repo}/tag/{tag}", _delete_tag),
        ("GET", "/api/{kinds}/{repo}", _info),
    ):
        router.add(method, pattern)(route)


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


def _validate_yaml(call: Call) -> Answer:
    try:
        _card(call.json["content"])
    except yaml.YAMLError as error:
        return json_answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return json_answer({"errors": [], "warnings": []})


def _card(text: str) -> Any:
    """The metadata of a card; None if it has none."""
    parts = text.split("---\n")
    return yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0] else None


def _create(call: Call) -> Answer:
    wanted = call.json
    namespace = wanted.get("organization") or (call.account.name if call.account else "")
    call.store.check_owner(namespace, call.account)
    kind, name = wanted.get("type") or "model", f"{namespace}/{wanted['name']}"
    url = f"{call.address}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in call.store.repositories:
        return json_answer({"error": f"You already created this {kind} repo", "url": url}, 409)
    call.store.create(kind, name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return json_answer({"url": url, "name": name, "id": name})


def _move(call: Call) -> Answer:
    wanted = call.json
    repository = call.store.writable(wanted["type"], wanted["fromRepo"], call.account)
    call.store.check_owner(wanted["toRepo"].split("/")[0], call.account)
    if (repository.kind, wanted["toRepo"]) in call.store.repositories:
        raise Refused(409, "There is a repository of that name")
    del call.store.repositories[repository.kind, repository.name]
    repository.name = wanted["toRepo"]
    call.store.repositories[repository.kind, repository.name] = repository
    return Answer()


def _delete(call: Call) -> Answer:
    wanted = call.json
    name = f"{wanted.get('organization') or (call.account.name if call.account else '')}/{wanted['name']}"
    repository = call.store.writable(wanted.get("type") or "model", name, call.account)
    del call.store.repositories[repository.kind, name]
    return Answer()


def _settings(call: Call) -> Answer:
    repository, wanted = call.writable(), call.json
    if "visibility" in wanted:
        repository.private = wanted["visibility"] == "private"
    repository.private = wanted.get("private", repository.private)
    repository.gated = wanted.get("gated", repository.gated)
    return json_answer({"private": repository.private, "gated": repository.gated})


def _list(call: Call) -> Answer:
    author = call.query.get("author", [None])[0]
    listed = []
    for (kind, name), repository in sorted(call.store.repositories.items()):
        hidden = repository.private and not (call.account and call.account.owns(name.split("/")[0]))
        if kind == call.kind and not hidden and author in (None, name.split("/")[0]):
            listed.append(_description(repository, "main", False))
    return json_answer(listed)


def _info(call: Call) -> Answer:
    return json_answer(_description(call.readable(), call.parts.get("revision", "main"), call.flag("blobs")))


def _description(repository: Repository, revision: str, blobs: bool) -> dict[str, Any]:
    commit = repository.find(revision)
    siblings = []
    for path, entry in sorted(commit.tree.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": entry.size, "blobId": entry.blob}
            if entry.sha256:
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 130}
        siblings.append(sibling)
    card = commit.tree.get("README.md")
    return {
        "_id": "0",
        "id": repository.name,
        "author": repository.name.split("/")[0],
        "sha": commit.id,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "lastModified": _DATE,
        "createdAt": _DATE,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "cardData": _card(repository.content(card).decode()) if card else None,
        "siblings": siblings,
    }


def _refs(call: Call) -> Answer:
    repository = call.readable()

    def listed(folder: str, refs: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": refs[name]} for name in sorted(refs)]

    branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
    return json_answer({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})


def _commits(call: Call) -> Answer:
    history = call.readable().history(call.parts["revision"])
    return json_answer(
        [{"id": each.id, "title": each.title, "message": "", "authors": [], "date": _DATE} for each in history]
    )


def _file(path: str, entry: Entry) -> dict[str, Any]:
    listed: dict[str, Any] = {"type": "file", "oid": entry.blob, "size": entry.size, "path": path}
    if entry.sha256:
        listed["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 130}
    return listed


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


def _tree(call: Call, page_size: int) -> Answer:
    tree = call.readable().find(call.parts["revision"]).tree
    root = call.parts.get("path", "")
    inside = {path: entry for path, entry in tree.items() if not root or path.startswith(f"{root}/")}
    if root and not inside:
        raise Missing("EntryNotFound", f"{root} does not exist")
    recursive, listed = call.flag("recursive"), {}
    for path, entry in inside.items():
        parts = path[len(root) + 1 if root else 0 :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = "/".join([*([root] if root else []), *parts[:depth]])
            listed[folder] = _folder(folder)
        if recursive or len(parts) == 1:
            listed[path] = _file(path, entry)
    entries = [listed[path] for path in sorted(listed)]
    start = int(call.query.get("cursor", ["0"])[0])
    more = {}
    if len(entries) > start + page_size:
        where = f"{call.address}{call.path}?recursive={recursive}&cursor={start + page_size}"
        more = {"Link": f'<{where}>; rel="next"'}
    return json_answer(entries[start : start + page_size], **more)


def _paths_info(call: Call) -> Answer:
    tree = call.readable().find(call.parts["revision"]).tree
    wanted = call.form if "urlencoded" in call.headers.get("content-type", "") else call.json
    found = []
    for path in wanted.get("paths", []):
        if path in tree:
            found.append(_file(path, tree[path]))
        elif any(each.startswith(f"{path}/") for each in tree):
            found.append(_folder(path))
    return json_answer(found)


def _create_branch(call: Call) -> Answer:
    repository, branch = call.writable(), call.parts["branch"]
    if branch in repository.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    repository.move(branch, repository.find(call.json.get("startingPoint", "main")).id)
    return Answer()


def _delete_branch(call: Call) -> Answer:
    repository, branch = call.writable(), call.parts["branch"]
    if branch == "main":
        raise Refused(403, "The main branch cannot be deleted")
    if repository.branches.pop(branch, None) is None:
        raise Missing("RevisionNotFound", f"Invalid rev id: {branch}")
    return Answer()


def _create_tag(call: Call) -> Answer:
    repository, tag = call.writable(), call.json["tag"]
    if tag in repository.tags:
        raise Refused(409, f"Tag already exists: {tag}")
    repository.tags[tag] = repository.find(call.parts["revision"]).id
    repository.moves.append((tag, repository.tags[tag]))
    return Answer()


def _delete_tag(call: Call) -> Answer:
    if call.writable().tags.pop(call.parts["tag"], None) is None:
        raise Missing("RevisionNotFound", f"Invalid rev id: {call.parts['tag']}")
    return Answer()
