"""What the Hub answers: refusals with a remedy, and answers that no Hub gives, in a line each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.hub_server.server import TOKEN, HubServer
from training.common.errors import StoppedError, UserError
from training.publishing.hub.collection import HubCollection
from training.publishing.hub.family import _check_writer
from training.publishing.hub.hub import Hub
from training.publishing.hub.retries import HubUnavailableError, Patience

REPO = "org/model"
FILES = {"README.md": b"# A model\n", "model.safetensors": bytes(range(256)) * 8192}

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def hub(client_waits: list[float]) -> Hub:
    return Hub(patience=Patience(tries=2, sleep=lambda _: None))


def release(hub: Hub) -> None:
    """All kinds of calls."""
    _check_writer(hub, "org")
    hub.ensure_repo(REPO)
    hub.files(REPO)
    commit = hub.publish(REPO, FILES, revision="v1", message="Release")
    hub.tag(REPO, "v1.0", commit)
    hub.read(REPO, "README.md", "v1")
    HubCollection(hub, "org", "Models").ensure(False)


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
def test_an_answer_that_no_hub_gives_is_told_in_a_line(
    hub: Hub, hub_server: HubServer, method: str, path: str, body: bytes
) -> None:
    hub_server.faults.add(method, path, body=body, times=None)
    try:
        release(hub)
    except (UserError, StoppedError) as error:
        assert len(str(error).splitlines()) == 1 and TOKEN not in str(error)
    else:
        # Of these the client asks nothing, or less than would show it.
        assert (path, body[:1]) in [("validate-yaml", b"{"), ("collections", b"["), ("collections", b"{")]
    assert hub_server.faults.script[0].met


def test_a_login_page_is_told_as_what_may_stand_between(hub: Hub, hub_server: HubServer) -> None:
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
        (422, "a name, or the header of the card, is not as the Hub wants it"),
        (507, "storage of its owner is full"),
    ],
)
@pytest.mark.parametrize("path", ["/commit/", "objects/batch", "/repos/create"])
def test_a_refusal_comes_with_its_remedy(
    hub: Hub, hub_server: HubServer, refuses: Refuses, path: str, status: int, remedy: str
) -> None:
    # A repository that is there already is no refusal.
    if (path, status) == ("/repos/create", 409):
        return
    hub_server.faults.add("POST", path, status=status, times=None)
    with refuses(REPO, remedy, "an injected fault"):
        release(hub)


def test_a_full_storage_that_the_hub_calls_forbidden(hub: Hub, hub_server: HubServer, refuses: Refuses) -> None:
    body = b'{"error": "Private repository storage limit reached"}'
    hub_server.faults.add("POST", "/commit/", status=403, body=body, times=None)
    with refuses("Private repository storage limit reached", "storage of its owner is full"):
        release(hub)


@pytest.mark.parametrize("status", [401, 403])
def test_the_storage_that_refuses_is_not_taken_for_the_hub(
    hub: Hub, hub_server: HubServer, refuses: Refuses, status: int
) -> None:
    hub_server.faults.add("PUT", "/storage/", status=status, times=None)
    with refuses("the Hub's storage of large files refuses it", f"status {status}", "has expired", "run the same"):
        release(hub)


def test_a_download_that_is_forbidden_is_not_told_as_unavailable(
    hub: Hub, hub_server: HubServer, refuses: Refuses
) -> None:
    hub_server.faults.add("", "/resolve/", status=403, times=None)
    with refuses(REPO, "may not be read by this login", "403"):
        release(hub)


def test_a_branch_that_is_listed_late_is_waited_for(hub: Hub, hub_server: HubServer) -> None:
    hub.ensure_repo(REPO)
    hub_server.faults.add("POST", "/branch/", body=b"{}")
    commit = hub.publish(REPO, FILES, revision="v1", message="Release")
    assert hub_server.repository(REPO).branches["v1"] == commit
