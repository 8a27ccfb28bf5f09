"""Writing to the Hub: exact, atomic, idempotent, and patient."""

from __future__ import annotations

import pytest

from tests.hub_server.server import HubServer
from training.publishing.hub import Hub, Patience

REPO = "org/model"
BIG = bytes(range(256)) * 6000  # 1.5 MB: uploaded before the commit
FILES = {"README.md": b"# Card\n", "config.json": b"{}", "1_Pooling/config.json": b"{}", "model.safetensors": BIG}


@pytest.fixture
def waits() -> list[float]:
    """Seconds that the Hub would have slept."""
    return []


@pytest.fixture
def hub(client_waits: list[float], waits: list[float]) -> Hub:
    hub = Hub(patience=Patience(tries=3, sleep=waits.append))
    hub.ensure_repo(REPO)
    return hub


def test_publish_is_exact_and_does_nothing_the_second_time(hub: Hub, hub_server: HubServer) -> None:
    commit = hub.publish(REPO, FILES, message="Release")
    repository = hub_server.repository(REPO)
    assert repository.files() == FILES
    assert repository.branches == {"main": commit}
    assert hub.publish(REPO, FILES, message="Again") == commit
    fewer = {"README.md": b"# New\n", "model.safetensors": BIG}
    second = hub.publish(REPO, fewer, message="Fewer")
    assert repository.files() == fewer
    assert repository.find("main").parent == commit != second
    assert ".gitattributes" in repository.find("main").tree


def test_a_new_revision_appears_whole(hub: Hub, hub_server: HubServer) -> None:
    hub.publish(REPO, FILES, message="Release")
    files = {"config.json": b"[]", "model.safetensors": BIG}
    commit = hub.publish(REPO, files, revision="stage1-step-005000", message="Step 5000")
    repository = hub_server.repository(REPO)
    assert repository.files("stage1-step-005000") == files
    assert repository.files() == FILES
    assert set(repository.branches) == {"main", "stage1-step-005000"}
    assert [to for name, to in repository.moves if name == "stage1-step-005000"] == [commit]


@pytest.mark.parametrize("status", [500, 503, 429])
@pytest.mark.parametrize("path", ["/repos/create", "/refs", "/branch/", "/commit/", "/preupload/", "/tree/"])
def test_a_fault_that_passes_is_waited_for(
    client_waits: list[float], waits: list[float], hub_server: HubServer, status: int, path: str
) -> None:
    hub = Hub(patience=Patience(tries=3, sleep=waits.append))
    hub_server.faults.add("", path, status=status, times=2, retry_after=7 if status == 429 else None)
    hub.ensure_repo(REPO)
    hub.publish(REPO, FILES, revision="new", message="New")
    repository = hub_server.repository(REPO)
    assert repository.files("new") == FILES
    assert set(repository.branches) == {"main", "new"}
    assert len(repository.commits) == 2
    assert len(waits) + len(client_waits) == 2
    if status == 429:
        assert min([*waits, *client_waits]) >= 7


def test_a_lost_answer_makes_no_second_commit(hub: Hub, hub_server: HubServer) -> None:
    lost = hub_server.faults.add("POST", "/commit/", lose_answer=True)
    commit = hub.publish(REPO, FILES, message="Release")
    repository = hub_server.repository(REPO)
    assert lost.met == 1
    assert len(hub_server.requests("POST", "/commit/")) == 1
    assert repository.history("main")[0].id == commit
    assert len(repository.commits) == 2
