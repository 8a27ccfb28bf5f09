"""The Hub's API of contents: what is uploaded how, large files, commits, and downloads with ranges."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from typing import Any

from tests.hub_server.messages import Answer, Call, Router, json_answer
from tests.hub_server.store import Missing, Refused, Repository

__all__ = ["add_content_routes"]

_LARGE = re.compile(r"\.(safetensors|parquet|npz|npy|bin|png|jpg|gz|zip|arrow|onnx)$")
_LARGEST_REGULAR = 10 * 2**20


def add_content_routes(router: Router) -> None:
    for method, pattern, route in (
        ("POST", "/api/{kinds}/{repo}/preupload/{revision}", _preupload),
        ("POST", "/api/{kinds}/{repo}/commit/{revision}", _commit),
        ("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch", _batch),
        # Signed addresses, as those of a storage service: they are used without a token.
        ("PUT", "/storage/{kinds}/{repo}/{sha256}", _store),
        ("POST", "/storage/{kinds}/{repo}/verify", _verify),
        ("GET", "/{prefix}{repo}/resolve/{revision}/{path}", _resolve),
        ("HEAD", "/{prefix}{repo}/resolve/{revision}/{path}", _resolve),
    ):
        router.add(method, pattern)(route)


def _preupload(call: Call) -> Answer:
    tree = call.writable().find(call.parts["revision"]).tree
    files = []
    for file in call.json["files"]:
        large = _LARGE.search(file["path"]) or file["size"] > _LARGEST_REGULAR or b"\0" in b64decode(file["sample"])
        listed: dict[str, Any] = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
        listed |= {"shouldIgnore": False, "oid": tree[file["path"]].oid if file["path"] in tree else None}
        files.append(listed)
    return json_answer({"files": files, "commitOid": call.parts["revision"]})


def _batch(call: Call) -> Answer:
    repository = call.writable()
    objects = []
    for each in call.json["objects"]:
        listed: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
        if each["oid"] not in repository.large:
            where = f"{call.address}/storage/{call.kind}s/{repository.name}"
            listed["actions"] = {"upload": {"href": f"{where}/{each['oid']}"}, "verify": {"href": f"{where}/verify"}}
        objects.append(listed)
    return json_answer({"transfer": "basic", "objects": objects})


def _store(call: Call) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != call.parts["sha256"]:
        raise Refused(400, "The content has another SHA-256 than its name says")
    call.store.repository(call.parts["repo"], call.kind).large[call.parts["sha256"]] = call.body
    return Answer(headers={"ETag": f'"{call.parts["sha256"]}"'})


def _verify(call: Call) -> Answer:
    large = call.store.repository(call.parts["repo"], call.kind).large
    if len(large.get(call.json["oid"], b"")) != call.json["size"]:
        raise Refused(404, "No such object")
    return Answer()


def _commit(call: Call) -> Answer:
    repository = call.writable()
    lines = [json.loads(line) for line in call.body.splitlines() if line]
    header: dict[str, Any] = {}
    added, deleted = {}, []
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            header = value
        elif key == "file":
            added[value["path"]] = repository.add_blob(b64decode(value["content"]))
        elif key == "lfsFile":
            added[value["path"]] = repository.large_entry(value["oid"])
        elif key == "deletedFile":
            deleted.append(value["path"])
        elif key == "deletedFolder":
            deleted += _inside(repository, call.parts["revision"], value["path"])
        else:
            raise Refused(400, f"unknown operation {key}")
    revision, parent = call.parts["revision"], header.get("parentCommit")
    commit = repository.commit(revision, header["summary"], added, deleted, parent)
    url = f"{call.address}/{'' if call.kind == 'model' else call.kind + 's/'}{repository.name}/commit/{commit.id}"
    return json_answer({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})


def _inside(repository: Repository, revision: str, folder: str) -> list[str]:
    return [path for path in repository.find(revision).tree if path.startswith(f"{folder.rstrip('/')}/")]


def _resolve(call: Call) -> Answer:
    repository = call.readable()
    commit = repository.find(call.parts["revision"])
    entry = commit.tree.get(call.parts["path"])
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    if entry is None:
        raise Missing("EntryNotFound", "Entry not found")
    content = repository.content(entry)
    headers |= {"ETag": f'"{entry.oid}"', "Content-Type": "application/octet-stream"}
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if not wanted:
        return Answer(200, content, headers)
    first = int(wanted[1]) if wanted[1] else max(len(content) - int(wanted[2]), 0)
    last = min(int(wanted[2]), len(content) - 1) if wanted[1] and wanted[2] else len(content) - 1
    if first > last:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Answer(206, content[first : last + 1], headers)
