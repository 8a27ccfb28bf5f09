"""Writing to the Hub: exact, whole or absent, and once."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import HfApi, close_session, get_session

from tests.hub_server.client import connected
from tests.hub_server.server import HubServer
from tests.hub_server.store import Repository
from training.publishing.hub.hub import Hub, HubRepository
from training.publishing.hub.retries import HubUnavailableError, RetryPolicy

REPO, NEW = "org/model", "stage1-step-005000"
LARGE = bytes(range(256)) * 6000  # 1.5 MB: not kept in memory
FILES = {"README.md": b"# Card\n", "config.json": b"{}", "1_Pooling/config.json": b"{}", "model.safetensors": LARGE}
SHARDS = {f"model-{part}.safetensors": bytes([part]) * 2**20 for part in (1, 2, 3)}


@pytest.fixture
def repo(hub: Hub) -> HubRepository:
    repo = hub.repository(REPO)
    repo.ensure()
    return repo


@pytest.fixture
def stored(repo: HubRepository, hub_server: HubServer) -> Repository:
    """The server's side of the repository."""
    return hub_server.repository(REPO)


def test_publish_is_exact_and_does_nothing_the_second_time(repo, stored):
    commit = repo.publish(FILES, "Release")
    assert stored.files() == FILES
    assert stored.branches == {"main": commit}
    assert repo.publish(FILES, "Again") == commit
    fewer = {"README.md": b"# New\n", "model.safetensors": LARGE}
    second = repo.publish(fewer, "Fewer")
    assert stored.files() == fewer
    assert stored.find("main").parent == commit != second
    assert ".gitattributes" in stored.find("main").tree
    repo.publish({"README.md": b"# New\n"}, "One less")
    assert stored.files() == {"README.md": b"# New\n"}


def test_files_on_disk_and_bytes_are_the_same(repo, stored, tmp_path):
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    commit = repo.publish({path: tmp_path / path for path in FILES}, "Release")
    assert stored.files() == FILES
    assert repo.publish(FILES, "Again") == commit
    # A change that keeps the size is a change.
    assert repo.publish({**FILES, "config.json": b"[]"}, "Other") != commit


def test_what_is_there_can_be_read(repo, hub):
    commit = repo.publish(FILES, "Release")
    assert repo.read("1_Pooling/config.json", commit) == b"{}"
    assert {*(repo.files(commit) or ())} == {*FILES, ".gitattributes"}
    missing, data = hub.repository("org/no"), hub.repository(REPO, "dataset")
    assert repo.read("nothing.json") is repo.read("README.md", "nowhere") is missing.read("a") is None
    assert repo.files("nowhere") is missing.files() is data.files() is None


def test_a_long_listing_has_all_pages(tmp_path):
    with HubServer(page_size=3) as server, connected(server, tmp_path):
        repo = Hub().repository(REPO)
        repo.ensure()
        files = {f"folder/{number}.json": b"%d" % number for number in range(20)}
        assert {*(repo.files(repo.publish(files, "Many")) or ())} == {*files, ".gitattributes"}


def test_a_new_branch_appears_whole(repo, stored):
    repo.publish(FILES, "Release")
    files = {"config.json": b"[]", "model.safetensors": LARGE}
    # A branch that an interrupted upload left does no harm.
    stored.move(f"{NEW}.partial", stored.branches["main"])
    stored.commit(f"{NEW}.partial", "half", {"half.txt": stored.add_blob(b"half")}, [])
    commit = repo.publish(files, "Step 5000", NEW)
    assert stored.files(NEW) == files
    assert stored.files() == FILES
    assert set(stored.branches) == {"main", NEW}
    assert [to for name, to in stored.moves if name == NEW] == [commit]


@pytest.mark.parametrize("status", [500, 503, 429])
@pytest.mark.parametrize("path", ["/repos/create", "/refs", "/branch/", "/commit/", "/preupload/", "/tree/", "storage"])
def test_a_temporary_fault_is_waited_for(hub, client_waits, waits, hub_server, status, path):
    hub_server.faults.add("", path, status=status, times=2, retry_after=7 if status == 429 else None)
    hub.repository(REPO).ensure()
    hub.repository(REPO).publish(FILES, "New", NEW)
    stored = hub_server.repository(REPO)
    assert stored.files(NEW) == FILES
    assert set(stored.branches) == {"main", NEW}
    assert len(stored.commits) == 2
    assert len(waits) + len(client_waits) == 2
    if status == 429:
        assert min([*waits, *client_waits]) >= 7


@pytest.mark.parametrize("branch", ["main", NEW])
@pytest.mark.parametrize("path", ["/commit/", "/branch/", "/repos/create", "/tag/"])
def test_a_lost_answer_does_nothing_twice(hub, hub_server, branch, path):
    hub_server.faults.add("POST", path, lose_answer=True)
    repo = hub.repository(REPO)
    repo.ensure()
    commit = repo.publish(FILES, "Release", branch)
    repo.tag("v1.0", commit)
    stored = hub_server.repository(REPO)
    assert stored.branches[branch] == stored.tags["v1.0"] == commit
    assert stored.files(branch) == FILES
    assert len(stored.commits) == 2
    assert len(hub_server.requests("POST", "/commit/")) == 1


@pytest.mark.parametrize("cut", [0, 300_000])
def test_an_upload_that_is_cut_is_resumed(repo, stored, hub_server, client_waits, cut):
    hub_server.faults.add("PUT", "storage", times=2, cut_after=cut)
    repo.publish(FILES, "Release")
    assert stored.files() == FILES
    assert len(client_waits) == 2


def test_an_interrupted_upload_is_completed_without_sending_all_again(repo, stored, hub_server):
    repo.publish(FILES, "Release")
    hub_server.faults.add("PUT", "storage", skip=2, times=None, cut_after=1000)
    with pytest.raises(HubUnavailableError, match=f"uploading to {REPO}"):
        repo.publish(SHARDS, "Step", NEW)
    assert NEW not in stored.branches
    assert stored.files() == FILES
    hub_server.faults.clear()
    sent = len(hub_server.requests("PUT", "storage"))
    repo.publish(SHARDS, "Step", NEW)
    assert stored.files(NEW) == SHARDS
    assert set(stored.branches) == {"main", NEW}
    assert len(hub_server.requests("PUT", "storage")) == sent + 1


@pytest.mark.parametrize("path", ["whoami", "/refs", "/commit/", "/tree/", "/branch/"])
def test_a_hub_that_stays_down_leaves_the_old_revision(repo, hub_server, path):
    commit = repo.publish(FILES, "Release")
    hub_server.faults.add("", path, status=503, times=None)
    with pytest.raises(HubUnavailableError, match="status 503"):
        Hub(retries=repo.hub.retries).repository(REPO).ensure()
        repo.publish(SHARDS, "Other")
        repo.publish(SHARDS, "Other", NEW)
    hub_server.faults.clear()
    stored = hub_server.repository(REPO)
    assert NEW not in stored.branches
    assert stored.files() == (SHARDS if path == "/branch/" else FILES)
    assert commit in [each.id for each in stored.history("main")]
    repo.publish(SHARDS, "Other", NEW)
    assert stored.files(NEW) == SHARDS
    assert set(stored.branches) == {"main", NEW}


def test_a_hub_that_asks_to_wait_too_long_counts_as_down(repo, hub_server, waits):
    hub_server.faults.add("", "/refs", status=429, retry_after=3600)
    with pytest.raises(HubUnavailableError, match="status 429"):
        repo.publish(FILES, "Release")
    assert waits == []


def test_nobody_listening_counts_as_down(hub):
    with pytest.raises(HubUnavailableError, match="refused"):
        Hub(HfApi(endpoint="http://127.0.0.1:9"), hub.retries).repository(REPO).ensure()


def test_the_session_has_a_timeout_even_after_it_is_closed(hub):
    close_session()
    assert get_session().timeout.read == 300


def test_the_cache_is_not_taken_for_the_hub(repo, hub_server):
    repo.publish(FILES, "Release")
    assert repo.read("config.json") == b"{}"
    hub_server.faults.add("", "/resolve/", status=503, times=None)
    with pytest.raises(HubUnavailableError):
        repo.read("config.json")


def test_another_writer_is_not_overwritten(repo, stored, hub_server, refuses):
    repo.publish(FILES, "Release")
    hub_server.faults.add("POST", "/commit/", status=503)

    def meanwhile(seconds: float) -> None:
        stored.commit("main", "theirs", {"theirs.txt": stored.add_blob(b"theirs")}, [])

    other = Hub(retries=RetryPolicy(tries=3, sleep=meanwhile)).repository(REPO)
    with refuses(REPO, "somebody else wrote to main"):
        other.publish(SHARDS, "Ours")
    assert stored.files() == {**FILES, "theirs.txt": b"theirs"}


@pytest.mark.parametrize("branch", ["main", NEW])
def test_another_writer_at_the_last_moment_is_not_overwritten(repo, stored, refuses, monkeypatch, branch):
    repo.publish(FILES, "Release")
    send = repo.hub.api.create_commit

    def beaten(*args: Any, **options: Any) -> Any:
        patch.undo()
        if branch == NEW:
            stored.move(NEW, stored.branches["main"])
        stored.commit(branch, "theirs", {"theirs.txt": stored.add_blob(b"theirs")}, [])
        return send(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(repo.hub.api, "create_commit", beaten)
        with refuses(REPO, "somebody else", branch):
            repo.publish(SHARDS, "Ours", branch)
    assert stored.files(branch) == {**FILES, "theirs.txt": b"theirs"}


def test_a_file_that_changes_meanwhile_is_not_published(repo, stored, tmp_path, refuses, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(LARGE)
    upload = repo.hub.api.preupload_lfs_files

    def changed(*args: Any, **options: Any) -> None:
        file.write_bytes(bytes([2]) * len(LARGE))
        upload(*args, **options)

    monkeypatch.setattr(repo.hub.api, "preupload_lfs_files", changed)
    before = stored.branches["main"]
    with refuses("model.safetensors: was changed while it was uploaded", REPO):
        repo.publish({"model.safetensors": file, "config.json": b"{}"}, "Release")
    assert stored.branches["main"] == before


def test_a_branch_that_is_listed_late_is_waited_for(repo, stored, hub_server):
    hub_server.faults.add("POST", "/branch/", body=b"{}")
    assert repo.publish(FILES, "Release", NEW) == stored.branches[NEW]


def test_a_tag_is_moved_only_when_asked(repo, stored, refuses):
    first = repo.publish(FILES, "Release")
    repo.tag("v1.0", first)
    repo.tag("v1.0", first)
    second = repo.publish(SHARDS, "Other")
    with refuses(REPO, "v1.0", first[:12]):
        repo.tag("v1.0", second)
    assert stored.tags == {"v1.0": first}
    repo.tag("v1.0", second, replace=True)
    assert stored.tags == {"v1.0": second}
    with refuses(REPO, "v1.0 is a tag"):
        repo.publish(FILES, "Onto a tag", "v1.0")


def test_repositories_are_created_once_and_private_if_told(repo, hub, hub_server, refuses):
    hidden = hub.repository("org/hidden")
    for private in (True, True, None):
        hidden.ensure(private)
        assert hub_server.repository("org/hidden").private
    with refuses(REPO, "is public"):
        repo.ensure(private=True)
    assert len(hub_server.requests("POST", "/repos/create")) == 2


def test_a_repository_of_another_kind_is_refused(repo, hub, hub_server, refuses):
    with refuses(REPO, "is a model", "not a dataset"):
        hub.repository(REPO, "dataset").ensure()
    hub.repository("org/data", "dataset").ensure()
    with refuses("org/data", "is a dataset", "not a model"):
        hub.repository("org/data").ensure()
    # Both may exist if both were created on purpose.
    hub_server.store.create("dataset", REPO)
    hub.repository(REPO, "dataset").ensure()


def test_a_repository_that_cannot_be_written_is_refused(repo, stored, hub, hub_server, refuses):
    stranger = hub.repository("stranger/model")
    with refuses("stranger/model", "may not be written"):
        stranger.ensure()
    hub_server.store.create("model", "stranger/model")
    stranger.ensure()
    with refuses("stranger/model", "may not be written"):
        stranger.publish(FILES, "Release")
    assert hub_server.repository("stranger/model").files() == {}
    with refuses("org/missing", "no such model"):
        hub.repository("org/missing").publish(FILES, "Release")
    stored.branches.clear()
    with refuses(REPO, "no branch main"):
        repo.publish(FILES, "Release")
