"""The Hub's API of contents: uploads of large files, commits, and downloads with ranges."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from typing import Any

from tests.hub_server.routes import Answer, Call, json_answer, route
from tests.hub_server.store import Refused

_LARGE = re.compile(r"\.(safetensors|parquet|npz|npy|bin|png|jpg|gz|zip|arrow|onnx)$")
_LARGEST_REGULAR = 10 * 2**20


@route("POST", "/api/{kinds}/{repo}/preupload/{revision}")
def _preupload(call: Call) -> Answer:
    tree = call.writable().find(call.parts["revision"]).tree
    files = []
    for file in call.json["files"]:
        large = _LARGE.search(file["path"]) or file["size"] > _LARGEST_REGULAR or b"\0" in b64decode(file["sample"])
        held = tree.get(file["path"])
        listed = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        files.append({**listed, "oid": held and (held.sha256 or held.blob)})
    return json_answer({"files": files, "commitOid": call.parts["revision"]})


@route("POST", r"/{prefix}{repo}\.git/info/lfs/objects/batch")
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


# Signed addresses, as those of a storage service: they are used without a token.
@route("PUT", "/storage/{kinds}/{repo}/{sha256}")
def _store(call: Call) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != call.parts["sha256"]:
        raise Refused(400, "The content has another SHA-256 than its name says")
    call.store.repository(call.parts["repo"], call.kind).large[call.parts["sha256"]] = call.body
    return Answer(headers={"ETag": f'"{call.parts["sha256"]}"'})


@route("POST", "/storage/{kinds}/{repo}/verify")
def _verify(call: Call) -> Answer:
    large = call.store.repository(call.parts["repo"], call.kind).large
    if len(large.get(call.json["oid"], b"")) != call.json["size"]:
        raise Refused(404, "No such object")
    return Answer()


@route("POST", "/api/{kinds}/{repo}/commit/{revision}")
def _commit(call: Call) -> Answer:
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
        elif key == "deletedFile":
            deleted.append(value["path"])
        else:
            raise Refused(400, f"unknown operation {key}")
    parent = header.get("parentCommit")
    commit = repository.commit(call.parts["revision"], header["summary"], added, deleted, parent)
    url = f"{call.address}/{'' if call.kind == 'model' else 'datasets/'}{repository.name}/commit/{commit.id}"
    return json_answer({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""})


@route("GET HEAD", "/{prefix}{repo}/resolve/{revision}/{path}")
def _resolve(call: Call) -> Answer:
    repository = call.readable()
    commit = repository.find(call.parts["revision"])
    entry = commit.tree.get(call.parts["path"])
    if entry is None:
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
    if first > last:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Answer(206, content[first : last + 1], headers)
