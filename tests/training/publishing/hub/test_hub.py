"""Writing to the Hub: exact, whole or absent, and once; and what is said of answers that refuse it."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi, close_session, get_session

from tests.hub_server.client import connected
from training.common.errors import UserError
from training.publishing.hub.hub import Hub, HubRepository, HubUnavailableError

REPO, NEW = "org/model", "stage1-step-005000"
LARGE = bytes(range(256)) * 6000  # 1.5 MB: not kept in memory
FILES = {"README.md": b"# Card\n", "config.json": b"{}", "1_Pooling/config.json": b"{}", "model.safetensors": LARGE}
SHARDS = {f"model-{part}.safetensors": bytes([part]) * 2**20 for part in (1, 2, 3)}


@pytest.fixture
def repo(hub):
    repo = HubRepository(hub, REPO)
    repo.ensure()
    return repo


@pytest.fixture
def stored(repo, hub_server):
    """The server's side of the repository."""
    return hub_server.repository(REPO)


def test_publish_is_exact_and_does_nothing_the_second_time(repo, stored, tmp_path):
    commit = repo.write_branch(FILES, "Release")
    assert stored.files() == FILES and stored.branches == {"main": commit}
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert repo.write_branch({path: tmp_path / path for path in FILES}, "Again, from disk") == commit
    # A change that keeps the size is a change.
    second = repo.write_branch({**FILES, "config.json": b"[]"}, "Other")
    assert stored.find("main").parent == commit != second
    fewer = {"README.md": b"# New\n", "model.safetensors": LARGE}
    repo.write_branch(fewer, "Fewer")
    assert stored.files() == fewer and ".gitattributes" in stored.find("main").tree


def test_what_is_there_can_be_read_but_not_from_the_cache(repo, hub, hub_server):
    commit = repo.write_branch(FILES, "Release")
    assert repo.read("1_Pooling/config.json", commit) == b"{}"
    assert {*(repo.files(commit) or ())} == {*FILES, ".gitattributes"}
    missing, data = HubRepository(hub, "org/no"), HubRepository(hub, REPO, "dataset")
    assert repo.read("nothing.json") is repo.read("README.md", "nowhere") is missing.read("a") is None
    assert repo.files("nowhere") is missing.files() is data.files() is None
    hub_server.faults.add("", "/resolve/", status=503, times=None)
    with pytest.raises(HubUnavailableError):
        repo.read("1_Pooling/config.json", commit)


def test_a_new_branch_appears_whole(repo, stored):
    repo.write_branch(FILES, "Release")
    files = {"config.json": b"[]", "model.safetensors": LARGE}
    # A branch that an interrupted upload left does no harm.
    stored.move(f"{NEW}.partial", stored.branches["main"])
    stored.commit(f"{NEW}.partial", "half", {"half.txt": stored.add_blob(b"half")}, [])
    commit = repo.write_branch(files, "Step 5000", NEW)
    assert stored.files(NEW) == files and stored.files() == FILES
    assert set(stored.branches) == {"main", NEW}
    assert [to for name, to in stored.moves if name == NEW] == [commit]


def test_an_interrupted_upload_is_completed_without_sending_all_again(repo, stored, hub_server):
    repo.write_branch(FILES, "Release")
    hub_server.faults.add("PUT", "storage", skip=2, times=None, cut_after=1000)
    with pytest.raises(HubUnavailableError, match=f"preupload lfs files of {REPO}"):
        repo.write_branch(SHARDS, "Step", NEW)
    assert NEW not in stored.branches and stored.files() == FILES
    hub_server.faults.clear()
    sent = len(hub_server.requests("PUT", "storage"))
    repo.write_branch(SHARDS, "Step", NEW)
    assert stored.files(NEW) == SHARDS and set(stored.branches) == {"main", NEW}
    assert len(hub_server.requests("PUT", "storage")) == sent + 1


def test_the_hub_s_wait_is_kept_and_one_that_is_too_long_counts_as_down(repo, hub_server, waits):
    hub_server.faults.add("", "/refs", status=429, retry_after=7)
    repo.write_branch(FILES, "Release")
    assert waits == [7.0]
    hub_server.faults.add("", "/refs", status=429, retry_after=3600)
    with pytest.raises(HubUnavailableError, match="status 429"):
        repo.write_branch(FILES, "Release")
    assert waits == [7.0]


def test_nobody_listening_counts_as_down_and_a_hub_that_hangs_is_given_up(hub):
    with pytest.raises(HubUnavailableError, match="refused"):
        HubRepository(Hub(3, api=HfApi(endpoint="http://127.0.0.1:9")), REPO).ensure()
    close_session()
    assert get_session().timeout.read == 300


@pytest.mark.parametrize("branch", ["main", NEW])
def test_another_writer_at_the_last_moment_is_not_overwritten(repo, stored, refuses, monkeypatch, branch):
    repo.write_branch(FILES, "Release")
    send = repo.hub.api.create_commit

    def beaten(*args, **options):
        patch.undo()
        if branch == NEW:
            stored.move(NEW, stored.branches["main"])
        stored.commit(branch, "theirs", {"theirs.txt": stored.add_blob(b"theirs")}, [])
        return send(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(repo.hub.api, "create_commit", beaten)
        with refuses(REPO, "somebody else", branch):
            repo.write_branch(SHARDS, "Ours", branch)
    assert stored.files(branch) == {**FILES, "theirs.txt": b"theirs"}


def test_a_tag_moves_and_is_no_branch(repo, stored, refuses):
    for files in (FILES, FILES, SHARDS):
        commit = repo.write_branch(files, "Release")
        repo.tag("v1.0", commit)
        assert stored.tags == {"v1.0": commit}
    with refuses(REPO, "v1.0 is a tag"):
        repo.write_branch(FILES, "Onto a tag", "v1.0")


def test_repositories_are_created_once_and_private_if_asked(repo, hub, hub_server, refuses):
    hidden = HubRepository(hub, "org/hidden")
    for private in (True, True, None):
        hidden.ensure(private)
        assert hub_server.repository("org/hidden").private
    with refuses(REPO, "is public"):
        repo.ensure(private=True)
    assert len(hub_server.requests("POST", "/repos/create")) == 2


@pytest.mark.parametrize(
    ("path", "status", "remedy"),
    [
        ("/commit/", 402, "make room there"),
        ("objects/batch", 403, "this login may not do it"),
        ("/resolve/", 403, "the storage of its owner is full"),
        ("/repos/create", 422, "an injected fault"),
    ],
)
def test_a_refusal_comes_with_its_remedy(hub, hub_server, refuses, path, status, remedy):
    hub_server.faults.add("", path, status=status, times=None)
    repo = HubRepository(hub, REPO)
    with refuses(REPO, f"status {status}", remedy):
        repo.ensure()
        repo.write_branch(FILES, "Release", "v1")
        repo.read("README.md", "v1")


@pytest.mark.parametrize("token", ["hf_wrong", None, "hf_se\x0ccret"])
def test_a_wrong_login_is_explained_and_no_token_quoted(hub_server, tmp_path, token):
    with connected(hub_server, tmp_path, token), pytest.raises(UserError, match="hf auth login") as caught:
        HubRepository(Hub(), REPO).ensure()
    assert "hf_" not in str(caught.value)


def test_an_offline_client_is_explained(hub, refuses, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses("offline", "HF_HUB_OFFLINE"):
        HubRepository(hub, REPO).ensure()
