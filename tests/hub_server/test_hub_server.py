"""The loopback Hub answers huggingface_hub as the Hub does; the other tests rest on this."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

from tests.hub_server.client import connected
from tests.hub_server.server import ORGANISATION

REPO = f"{ORGANISATION}/model"


@pytest.fixture
def api(client_waits):
    api = HfApi()
    api.create_repo(REPO)
    return api


def commit(api, *operations, **options):
    return api.create_commit(REPO, operations, commit_message="Commit", **options).oid


def test_a_commit_adds_and_deletes_on_its_parent_only(api, tmp_path):
    files = {"a/b/c.json": b"{}", "model.safetensors": b"weights", "old.txt": b"old", "a/x.md": b"#"}
    first = commit(api, *(CommitOperationAdd(*file) for file in files.items()))
    second = commit(api, CommitOperationDelete("old.txt"), CommitOperationDelete("a/b/c.json"), parent_commit=first)
    assert {*api.list_repo_files(REPO)} == {".gitattributes", "model.safetensors", "a/x.md"}
    assert api.repo_info(REPO).sha == second
    assert {each.path for each in api.list_repo_tree(REPO)} == {".gitattributes", "model.safetensors", "a"}
    snapshot = Path(api.snapshot_download(REPO, revision=first, cache_dir=tmp_path))
    assert (snapshot / "a/b/c.json").read_bytes() == b"{}"
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, CommitOperationAdd("a.txt", b"3"), parent_commit=first)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "nothing.txt", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit(api, CommitOperationAdd("README.md", b"---\nname: [\n---\n"))


def test_accounts_see_and_write_what_is_theirs(api, hub_server, tmp_path):
    for name, status in ((REPO, "409"), ("stranger/model", "403")):
        with pytest.raises(HfHubHTTPError, match=status):
            api.create_repo(name)
    hub_server.repository(REPO).private = True
    assert api.repo_info(REPO).private
    with connected(hub_server, tmp_path, token=None), pytest.raises(RepositoryNotFoundError):
        HfApi().repo_info(REPO)
    with connected(hub_server, tmp_path, token="hf_wrong"), pytest.raises(HfHubHTTPError, match="401"):
        HfApi().repo_info(REPO)


def test_ranges_of_a_file_and_content_that_is_not_what_its_name_says(api, hub_server):
    commit(api, CommitOperationAdd("rows.parquet", b"0123456789"))
    address = f"{hub_server.address}/{REPO}/resolve/main/rows.parquet"
    for wanted, content, sent in (("2-4", b"234", "2-4"), ("7-", b"789", "7-9"), ("5-99", b"56789", "5-9")):
        part = get_session().get(address, headers={"Range": f"bytes={wanted}"})
        assert (part.status_code, part.content) == (206, content)
        assert part.headers["Content-Range"] == f"bytes {sent}/10"
    storage = f"{hub_server.address}/storage/models/{REPO}/{'0' * 64}"
    assert get_session().put(storage, content=b"other").status_code == 400
