"""What the Hub answers: refusals with a remedy, and answers that no Hub gives, in one line each."""

from __future__ import annotations

import pytest

from tests.hub_server.client import connected
from tests.hub_server.server import READ_TOKEN, TOKEN
from training.common.errors import StoppedError, UserError
from training.publishing.hub.family import HubCollection, check_writer
from training.publishing.hub.hub import Hub
from training.publishing.hub.retries import HubUnavailableError

REPO = "org/model"
FILES = {"README.md": b"# A model\n", "model.safetensors": bytes(range(256)) * 8192}


def release(hub: Hub) -> None:
    """Make calls of all kinds."""
    check_writer(hub, "org")
    repo = hub.repository(REPO)
    repo.ensure()
    repo.files()
    repo.tag("v1.0", repo.publish(FILES, "Release", "v1"))
    repo.read("README.md", "v1")
    collection = HubCollection(hub, "org", "Models")
    assert collection.find() is None
    collection.create(False)


_CALLS = [
    *(("GET", "whoami"), ("GET", "/refs"), ("GET", "/tree/"), ("POST", "/preupload/"), ("POST", "/commit/")),
    *(("POST", "/branch/"), ("POST", "/tag/"), ("POST", "/repos/create"), ("GET", r"/api/models/[^/]+/[^/]+$")),
    *(("POST", "objects/batch"), ("POST", "validate-yaml"), ("GET", "collections"), ("", "/resolve/")),
]
_BODIES = [
    b"<!DOCTYPE html><html>Log in</html>",
    b"",
    b"[]",
    b"{}",
    b"null",
    b'"x"',
    b"[1]",
    b"\xff",
    b'{"error": "x"}',
]


@pytest.mark.parametrize("body", _BODIES)
@pytest.mark.parametrize(("method", "path"), _CALLS)
def test_an_answer_that_no_hub_gives_is_explained_in_one_line(hub, hub_server, method, path, body):
    hub_server.faults.add(method, path, body=body, times=None)
    try:
        release(hub)
    except (UserError, StoppedError) as error:
        assert len(str(error).splitlines()) == 1 and TOKEN not in str(error)
    else:
        # Of these the client reads nothing, or too little to notice.
        assert (path, body[:1]) in [("validate-yaml", b"{"), ("collections", b"["), ("collections", b"{")]
    assert hub_server.faults.script[0].met


def test_a_login_page_is_explained_as_what_may_stand_between(hub, hub_server):
    hub_server.faults.add("GET", "/refs", body=b"<html>", times=None)
    with pytest.raises(HubUnavailableError, match=r"not one of a Hub .* proxy or a login page.* HF_ENDPOINT"):
        release(hub)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (402, "make room there"),
        (403, "may not be written by this login (status 403"),
        (409, "somebody else changes it at the same time; look at it and run the same command again"),
        (413, "make smaller files or room there"),
        (422, "the Hub does not accept a name or the header of the card"),
        (507, "storage of its owner is full"),
    ],
)
@pytest.mark.parametrize("path", ["/commit/", "objects/batch", "/repos/create"])
def test_a_refusal_comes_with_its_remedy(hub, hub_server, refuses, path, status, remedy):
    # A repository that exists already is not refused.
    if (path, status) == ("/repos/create", 409):
        return
    hub_server.faults.add("POST", path, status=status, times=None)
    with refuses(REPO, remedy, "an injected fault"):
        release(hub)


def test_a_full_storage_that_the_hub_calls_forbidden(hub, hub_server, refuses):
    body = b'{"error": "Private repository storage limit reached"}'
    hub_server.faults.add("POST", "/commit/", status=403, body=body, times=None)
    with refuses("Private repository storage limit reached", "storage of its owner is full"):
        release(hub)


@pytest.mark.parametrize("status", [401, 403])
def test_the_storage_that_refuses_is_not_taken_for_the_hub(hub, hub_server, refuses, status):
    hub_server.faults.add("PUT", "/storage/", status=status, times=None)
    with refuses("the Hub's storage of large files refuses it", f"status {status}", "has expired", "run the same"):
        release(hub)


def test_a_forbidden_download_is_not_explained_as_unavailable(hub, hub_server, refuses):
    hub_server.faults.add("", "/resolve/", status=403, times=None)
    with refuses(REPO, "may not be read by this login", "403"):
        release(hub)


@pytest.mark.parametrize(
    ("token", "parts"),
    [
        ("hf_wrong", ["refuses the login", "401", "hf auth login"]),
        (None, ["not logged in", "hf auth login", "HF_TOKEN"]),
        (READ_TOKEN, [REPO, "may not be written", "403"]),
    ],
)
def test_a_wrong_login_is_explained(hub_server, tmp_path, refuses, token, parts):
    with connected(hub_server, tmp_path, token), refuses(*parts):
        Hub().repository(REPO).ensure()
    hub_server.store.create("model", REPO)
    with connected(hub_server, tmp_path, token), refuses(*parts[:1]):
        repo = Hub().repository(REPO)
        repo.ensure()
        repo.publish(FILES, "Release")


def test_a_token_that_no_header_can_hold_is_not_quoted(hub_server, tmp_path):
    with connected(hub_server, tmp_path, "hf_se\x0ccret"), pytest.raises(UserError, match="hf auth login") as caught:
        Hub().repository(REPO).ensure()
    assert "hf_se" not in str(caught.value)


def test_an_offline_client_is_explained(hub, refuses, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses("offline", "HF_HUB_OFFLINE"):
        Hub().repository(REPO).ensure()
