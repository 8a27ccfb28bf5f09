"""Writing to the Hub: exact, whole or absent, once, and with words for what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from tests.hub_server.client import connected
from tests.hub_server.server import READ_TOKEN, HubServer
from tests.hub_server.store import Repository
from training.common.errors import UserError
from training.publishing.hub.hub import Hub
from training.publishing.hub.retries import HubUnavailableError, Patience

Refuses = Callable[..., AbstractContextManager[None]]

REPO, NEW = "org/model", "stage1-step-005000"
BIG = bytes(range(256)) * 6000  # 1.5 MB: uploaded before the commit
FILES = {"README.md": b"# Card\n", "config.json": b"{}", "1_Pooling/config.json": b"{}", "model.safetensors": BIG}
SHARDS = {f"model-{part}.safetensors": bytes([part]) * 2**20 for part in (1, 2, 3)}


@pytest.fixture
def waits() -> list[float]:
    """Seconds that the Hub would have slept."""
    return []


@pytest.fixture
def hub(client_waits: list[float], waits: list[float]) -> Hub:
    hub = Hub(patience=Patience(tries=3, sleep=waits.append))
    hub.ensure_repo(REPO)
    return hub


@pytest.fixture
def repository(hub: Hub, hub_server: HubServer) -> Repository:
    return hub_server.repository(REPO)


def test_publish_is_exact_and_does_nothing_the_second_time(hub: Hub, repository: Repository) -> None:
    commit = hub.publish(REPO, FILES, message="Release")
    assert repository.files() == FILES
    assert repository.branches == {"main": commit}
    assert hub.publish(REPO, FILES, message="Again") == commit
    fewer = {"README.md": b"# New\n", "model.safetensors": BIG}
    second = hub.publish(REPO, fewer, message="Fewer")
    assert repository.files() == fewer
    assert repository.find("main").parent == commit != second
    assert ".gitattributes" in repository.find("main").tree
    hub.publish(REPO, {"README.md": b"# New\n"}, message="One less")
    assert repository.files() == {"README.md": b"# New\n"}


def test_files_of_a_folder_and_bytes_are_the_same(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    commit = hub.publish(REPO, {path: tmp_path / path for path in FILES}, message="Release")
    assert repository.files() == FILES
    assert hub.publish(REPO, FILES, message="Again") == commit
    # A change that keeps the size is one.
    assert hub.publish(REPO, {**FILES, "config.json": b"[]"}, message="Other") != commit


def test_what_is_there_can_be_read(hub: Hub) -> None:
    commit = hub.publish(REPO, FILES, message="Release")
    assert hub.read(REPO, "1_Pooling/config.json", commit) == b"{}"
    assert {*(hub.files(REPO, commit) or ())} == {*FILES, ".gitattributes"}
    assert hub.read(REPO, "nothing.json") is hub.read(REPO, "README.md", "nowhere") is hub.read("org/no", "a") is None
    assert hub.files(REPO, "nowhere") is hub.files("org/no") is hub.files(REPO, repo_type="dataset") is None


def test_a_long_listing_has_all_pages(tmp_path: Path) -> None:
    with HubServer(page_size=3) as server, connected(server, tmp_path):
        hub = Hub()
        hub.ensure_repo(REPO)
        files = {f"folder/{number}.json": b"%d" % number for number in range(20)}
        commit = hub.publish(REPO, files, message="Many")
        assert {*(hub.files(REPO, commit) or ())} == {*files, ".gitattributes"}


def test_a_new_revision_appears_whole(hub: Hub, repository: Repository) -> None:
    hub.publish(REPO, FILES, message="Release")
    files = {"config.json": b"[]", "model.safetensors": BIG}
    commit = hub.publish(REPO, files, revision=NEW, message="Step 5000")
    assert repository.files(NEW) == files
    assert repository.files() == FILES
    assert set(repository.branches) == {"main", NEW}
    assert [to for name, to in repository.moves if name == NEW] == [commit]


@pytest.mark.parametrize("status", [500, 503, 429])
@pytest.mark.parametrize("path", ["/repos/create", "/refs", "/branch/", "/commit/", "/preupload/", "/tree/", "storage"])
def test_a_fault_that_passes_is_waited_for(
    client_waits: list[float], waits: list[float], hub_server: HubServer, status: int, path: str
) -> None:
    hub = Hub(patience=Patience(tries=3, sleep=waits.append))
    hub_server.faults.add("", path, status=status, times=2, retry_after=7 if status == 429 else None)
    hub.ensure_repo(REPO)
    hub.publish(REPO, FILES, revision=NEW, message="New")
    repository = hub_server.repository(REPO)
    assert repository.files(NEW) == FILES
    assert set(repository.branches) == {"main", NEW}
    assert len(repository.commits) == 2
    assert len(waits) + len(client_waits) == 2
    if status == 429:
        assert min([*waits, *client_waits]) >= 7


@pytest.mark.parametrize("branch", ["main", NEW])
@pytest.mark.parametrize("path", ["/commit/", "/branch/", "/repos/create"])
def test_a_lost_answer_does_nothing_twice(
    client_waits: list[float], waits: list[float], hub_server: HubServer, branch: str, path: str
) -> None:
    hub_server.faults.add("POST", path, lose_answer=True)
    hub = Hub(patience=Patience(tries=3, sleep=waits.append))
    hub.ensure_repo(REPO)
    commit = hub.publish(REPO, FILES, revision=branch, message="Release")
    repository = hub_server.repository(REPO)
    assert repository.branches[branch] == commit
    assert repository.files(branch) == FILES
    assert len(repository.commits) == 2
    assert len(hub_server.requests("POST", "/commit/")) == 1


@pytest.mark.parametrize("cut", [0, 300_000])
def test_an_upload_that_is_cut_is_resumed(
    hub: Hub, repository: Repository, hub_server: HubServer, client_waits: list[float], cut: int
) -> None:
    hub_server.faults.add("PUT", "storage", times=2, cut_after=cut)
    hub.publish(REPO, FILES, message="Release")
    assert repository.files() == FILES
    assert len(client_waits) == 2


def test_a_run_that_was_cut_off_is_completed_by_the_next_without_sending_all_again(
    hub: Hub, repository: Repository, hub_server: HubServer
) -> None:
    hub.publish(REPO, FILES, message="Release")
    hub_server.faults.add("PUT", "storage", skip=2, times=None, cut_after=1000)
    with pytest.raises(HubUnavailableError, match=f"uploading model-3.safetensors to {REPO}"):
        hub.publish(REPO, SHARDS, revision=NEW, message="Step")
    assert NEW not in repository.branches
    assert repository.files() == FILES
    hub_server.faults.clear()
    sent = len(hub_server.requests("PUT", "storage"))
    hub.publish(REPO, SHARDS, revision=NEW, message="Step")
    assert repository.files(NEW) == SHARDS
    assert set(repository.branches) == {"main", NEW}
    assert len(hub_server.requests("PUT", "storage")) == sent + 1


@pytest.mark.parametrize("path", ["whoami", "/refs", "/commit/", "/tree/", "/branch/"])
def test_a_hub_that_stays_down_leaves_the_old_revision(hub: Hub, hub_server: HubServer, path: str) -> None:
    commit = hub.publish(REPO, FILES, message="Release")
    hub_server.faults.add("", path, status=503, times=None)
    with pytest.raises(HubUnavailableError, match="status 503"):
        Hub(patience=hub.patience).ensure_repo(REPO)
        hub.publish(REPO, SHARDS, message="Other")
        hub.publish(REPO, SHARDS, revision=NEW, message="Other")
    hub_server.faults.clear()
    repository = hub_server.repository(REPO)
    assert NEW not in repository.branches
    assert repository.files() == (SHARDS if path == "/branch/" else FILES)
    assert commit in [each.id for each in repository.history("main")]
    hub.publish(REPO, SHARDS, revision=NEW, message="Other")
    assert repository.files(NEW) == SHARDS
    assert set(repository.branches) == {"main", NEW}


def test_a_hub_that_asks_for_too_much_patience_counts_as_down(hub: Hub, hub_server: HubServer, waits: list) -> None:
    hub_server.faults.add("", "/refs", status=429, retry_after=3600)
    with pytest.raises(HubUnavailableError, match="status 429"):
        hub.publish(REPO, FILES, message="Release")
    assert waits == []


def test_nobody_listening_counts_as_down(hub: Hub) -> None:
    dead = Hub(HfApi(endpoint="http://127.0.0.1:9"), hub.patience)
    with pytest.raises(HubUnavailableError, match="refused"):
        dead.ensure_repo(REPO)


def test_the_cache_is_not_taken_for_the_hub(hub: Hub, hub_server: HubServer) -> None:
    hub.publish(REPO, FILES, message="Release")
    assert hub.read(REPO, "config.json") == b"{}"
    hub_server.faults.add("", "/resolve/", status=503, times=None)
    with pytest.raises(HubUnavailableError):
        hub.read(REPO, "config.json")


def test_another_writer_is_not_overwritten(
    hub: Hub, repository: Repository, hub_server: HubServer, refuses: Refuses
) -> None:
    hub.publish(REPO, FILES, message="Release")
    hub_server.faults.add("POST", "/commit/", status=503)
    waited = hub.patience.sleep

    def meanwhile(seconds: float) -> None:
        waited(seconds)
        repository.commit("main", "theirs", {"theirs.txt": repository.add_blob(b"theirs")}, [])

    other = Hub(patience=Patience(tries=3, sleep=meanwhile))
    with refuses(REPO, "somebody else wrote to main"):
        other.publish(REPO, SHARDS, message="Ours")
    assert repository.files() == {**FILES, "theirs.txt": b"theirs"}


@pytest.mark.parametrize("branch", ["main", NEW])
def test_another_writer_at_the_last_moment_is_not_overwritten(
    hub: Hub, repository: Repository, refuses: Refuses, monkeypatch: pytest.MonkeyPatch, branch: str
) -> None:
    hub.publish(REPO, FILES, message="Release")
    send = hub.api.create_commit

    def beaten(*args: Any, **options: Any) -> Any:
        patch.undo()
        if branch == NEW:
            repository.move(NEW, repository.branches["main"])
        repository.commit(branch, "theirs", {"theirs.txt": repository.add_blob(b"theirs")}, [])
        return send(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hub.api, "create_commit", beaten)
        with refuses(REPO, "somebody else", branch):
            hub.publish(REPO, SHARDS, revision=branch, message="Ours")
    assert repository.files(branch) == {**FILES, "theirs.txt": b"theirs"}


def test_a_file_that_changes_meanwhile_is_not_published(
    hub: Hub, repository: Repository, tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(BIG)
    hub.publish(REPO, {"model.safetensors": file, "config.json": b"{}"}, message="Release")
    file.write_bytes(bytes([1]) * len(BIG))
    upload = hub.api.preupload_lfs_files

    def changed(*args: Any, **options: Any) -> None:
        file.write_bytes(bytes([2]) * len(BIG))
        upload(*args, **options)

    monkeypatch.setattr(hub.api, "preupload_lfs_files", changed)
    before = repository.branches["main"]
    with refuses("model.safetensors: was changed while it was uploaded", REPO):
        hub.publish(REPO, {"model.safetensors": file, "config.json": b"{}"}, message="Release")
    assert repository.branches["main"] == before


def test_a_branch_that_an_interruption_left_is_removed(hub: Hub, repository: Repository) -> None:
    repository.move(f"{NEW}.partial", repository.branches["main"])
    repository.commit(f"{NEW}.partial", "half", {"half.txt": repository.add_blob(b"half")}, [])
    hub.publish(REPO, FILES, revision=NEW, message="Step")
    assert set(repository.branches) == {"main", NEW}


def test_a_tag_stays_where_it_is_unless_told(hub: Hub, repository: Repository, refuses: Refuses) -> None:
    first = hub.publish(REPO, FILES, message="Release")
    hub.tag(REPO, "v1.0", first)
    hub.tag(REPO, "v1.0", first)
    second = hub.publish(REPO, SHARDS, message="Other")
    with refuses(REPO, "v1.0", first[:12]):
        hub.tag(REPO, "v1.0", second)
    assert repository.tags == {"v1.0": first}
    hub.tag(REPO, "v1.0", second, replace=True)
    assert repository.tags == {"v1.0": second}
    with refuses(REPO, "v1.0 is a tag"):
        hub.publish(REPO, FILES, revision="v1.0", message="Onto a tag")


def test_a_lost_answer_to_a_tag_is_no_matter(hub: Hub, repository: Repository, hub_server: HubServer) -> None:
    hub_server.faults.add("POST", "/tag/", lose_answer=True)
    commit = hub.publish(REPO, FILES, message="Release")
    hub.tag(REPO, "v1.0", commit)
    assert repository.tags == {"v1.0": commit}


def test_repositories_are_made_once_and_private_if_told(hub: Hub, hub_server: HubServer, refuses: Refuses) -> None:
    hub.ensure_repo("org/hidden", private=True)
    hub.ensure_repo("org/hidden", private=True)
    assert hub_server.repository("org/hidden").private
    hub.ensure_repo("org/hidden")
    assert hub_server.repository("org/hidden").private
    with refuses(REPO, "is public"):
        hub.ensure_repo(REPO, private=True)
    assert len(hub_server.requests("POST", "/repos/create")) == 2


def test_a_repository_of_another_kind_is_refused(hub: Hub, hub_server: HubServer, refuses: Refuses) -> None:
    with refuses(REPO, "is a model", "not a dataset"):
        hub.ensure_repo(REPO, "dataset")
    hub.ensure_repo("org/data", "dataset")
    with refuses("org/data", "is a dataset", "not a model"):
        hub.ensure_repo("org/data")
    # Both may be there if both were made on purpose.
    hub_server.store.create("dataset", REPO)
    hub.ensure_repo(REPO, "dataset")


def test_a_repository_of_somebody_else_is_refused(hub: Hub, hub_server: HubServer, refuses: Refuses) -> None:
    with refuses("stranger/model", "may not be written"):
        hub.ensure_repo("stranger/model")
    hub_server.store.create("model", "stranger/model")
    hub.ensure_repo("stranger/model")
    with refuses("stranger/model", "may not be written"):
        hub.publish("stranger/model", FILES, message="Release")
    assert hub_server.repository("stranger/model").files() == {}


def test_a_repository_that_is_missing_is_refused(hub: Hub, refuses: Refuses) -> None:
    with refuses("org/missing", "no such model"):
        hub.publish("org/missing", FILES, message="Release")


def test_a_repository_without_a_main_branch_is_refused(hub: Hub, repository: Repository, refuses: Refuses) -> None:
    repository.branches.clear()
    with refuses(REPO, "no branch main"):
        hub.publish(REPO, FILES, message="Release")


@pytest.mark.parametrize(
    ("token", "parts"),
    [
        ("hf_wrong", ["refuses the login", "401", "hf auth login"]),
        (None, ["not logged in", "hf auth login", "HF_TOKEN"]),
        (READ_TOKEN, [REPO, "may not be written", "403"]),
    ],
)
def test_a_login_that_will_not_do_is_explained(
    hub_server: HubServer, tmp_path: Path, refuses: Refuses, token: str | None, parts: list[str]
) -> None:
    with connected(hub_server, tmp_path, token), refuses(*parts):
        Hub().ensure_repo(REPO)
    hub_server.store.create("model", REPO)
    with connected(hub_server, tmp_path, token), refuses(*parts[:1]):
        hub = Hub()
        hub.ensure_repo(REPO)
        hub.publish(REPO, FILES, message="Release")


def test_a_token_that_no_header_can_hold_is_not_told(hub_server: HubServer, tmp_path: Path) -> None:
    with connected(hub_server, tmp_path, "hf_se\x0ccret"), pytest.raises(UserError, match="hf auth login") as caught:
        Hub().ensure_repo(REPO)
    assert "hf_se" not in str(caught.value)


def test_a_client_that_is_offline_is_explained(hub: Hub, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses("offline", "HF_HUB_OFFLINE"):
        Hub().ensure_repo(REPO)
