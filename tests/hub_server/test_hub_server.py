"""The loopback Hub answers huggingface_hub as the Hub does; the other tests rest on this."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server.client import connected
from tests.hub_server.server import ORGANISATION, TOKEN

REPO = f"{ORGANISATION}/model"


@pytest.fixture
def api(client_waits: list[float]) -> HfApi:
    api = HfApi()
    api.create_repo(REPO)
    return api


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def test_a_commit_adds_and_deletes(api, tmp_path):
    files = {"a/b/c.json": b"{}", "model.safetensors": b"weights", "old.txt": b"old", "a/x.md": b"#"}
    first = api.create_commit(REPO, [add(*file) for file in files.items()], commit_message="First").oid
    deletions = [CommitOperationDelete("old.txt"), CommitOperationDelete("a/b/c.json")]
    second = api.create_commit(REPO, deletions, commit_message="Second", parent_commit=first).oid
    assert {*api.list_repo_files(REPO)} == {".gitattributes", "model.safetensors", "a/x.md"}
    assert {*api.list_repo_files(REPO, revision=first)} > {"old.txt", "a/b/c.json"}
    assert api.repo_info(REPO).sha == second
    assert Path(api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)).read_bytes() == b"weights"
    assert {each.path for each in api.list_repo_tree(REPO)} == {".gitattributes", "model.safetensors", "a"}
    assert {each.path for each in api.list_repo_tree(REPO, "a")} == {"a/x.md"}
    snapshot = Path(api.snapshot_download(REPO, revision=first, cache_dir=tmp_path))
    assert (snapshot / "a/b/c.json").read_bytes() == b"{}"


def test_a_commit_on_another_parent_is_refused(api, hub_server):
    first = api.create_commit(REPO, [add("a.txt", b"1")], commit_message="First").oid
    api.create_commit(REPO, [add("a.txt", b"2")], commit_message="Second")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [add("a.txt", b"3")], commit_message="Third", parent_commit=first)
    assert hub_server.repository(REPO).files() == {"a.txt": b"2"}


def test_branches_and_tags_come_and_go(api):
    commit = api.create_commit(REPO, [add("a.txt", b"1")], commit_message="First").oid
    api.create_branch(REPO, branch="with/slash")
    api.create_tag(REPO, tag="v1.0")
    refs = api.list_repo_refs(REPO)
    assert {each.name: each.target_commit for each in refs.branches} == {"main": commit, "with/slash": commit}
    assert {each.name: each.target_commit for each in refs.tags} == {"v1.0": commit}
    for again in (lambda: api.create_branch(REPO, branch="with/slash"), lambda: api.create_tag(REPO, tag="v1.0")):
        with pytest.raises(HfHubHTTPError, match="409"):
            again()
    api.delete_branch(REPO, branch="with/slash")
    api.delete_tag(REPO, tag="v1.0")
    assert ([each.name for each in api.list_repo_refs(REPO).branches], api.list_repo_refs(REPO).tags) == (["main"], [])
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(REPO, branch="main")


def test_what_does_not_exist_is_named_as_the_client_knows_it(api, tmp_path):
    with pytest.raises(RepositoryNotFoundError) as missing:
        api.repo_info("org/nothing")
    assert not isinstance(missing.value, GatedRepoError)
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "nothing.txt", cache_dir=tmp_path)


def test_accounts_see_and_write_what_is_theirs(api, hub_server, tmp_path):
    assert (api.whoami()["name"], [each["name"] for each in api.whoami()["orgs"]]) == ("ada", [ORGANISATION])
    for name, status in ((REPO, "409"), ("stranger/model", "403")):
        with pytest.raises(HfHubHTTPError, match=status):
            api.create_repo(name)
    hub_server.repository(REPO).private = True
    assert api.repo_info(REPO).private
    with connected(hub_server, tmp_path, token=None), pytest.raises(RepositoryNotFoundError):
        HfApi().repo_info(REPO)
    hub_server.repository(REPO).private = False
    with connected(hub_server, tmp_path, token=None):
        assert HfApi().repo_info(REPO).id == REPO
    with connected(hub_server, tmp_path, token="hf_wrong"), pytest.raises(HfHubHTTPError, match="401"):
        HfApi().repo_info(REPO)


def test_ranges_and_hashes_of_a_file(api, hub_server):
    commit = api.create_commit(REPO, [add("rows.parquet", b"0123456789")], commit_message="Rows").oid
    address = f"{hub_server.address}/{REPO}/resolve/main/rows.parquet"
    head = get_session().head(address)
    assert (head.headers["X-Repo-Commit"], head.headers["X-Linked-Size"]) == (commit, "10")
    assert head.headers["X-Linked-Etag"] == head.headers["ETag"]
    for wanted, content, sent in (("2-4", b"234", "2-4"), ("7-", b"789", "7-9"), ("5-99", b"56789", "5-9")):
        part = get_session().get(address, headers={"Range": f"bytes={wanted}"})
        assert (part.status_code, part.content) == (206, content)
        assert part.headers["Content-Range"] == f"bytes {sent}/10"
    assert get_session().get(address, headers={"Range": "bytes=10-"}).status_code == 416


def test_a_large_file_must_be_what_its_name_says(api, hub_server):
    address = f"{hub_server.address}/storage/models/{REPO}/{'0' * 64}"
    assert get_session().put(address, content=b"other").status_code == 400
    lines = b'{"key": "header", "value": {"summary": "x"}}\n' + (
        b'{"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "%s", "size": 5}}' % (b"0" * 64)
    )
    headers = {"Authorization": f"Bearer {TOKEN}"}
    commit = get_session().post(f"{hub_server.address}/api/models/{REPO}/commit/main", content=lines, headers=headers)
    assert commit.status_code == 400
    assert hub_server.repository(REPO).files() == {}


def test_a_card_with_damaged_metadata_is_refused(api):
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_commit(REPO, [add("README.md", b"---\nname: [\n---\n")], commit_message="Card")


def test_collections_hold_items_in_order(api):
    collection = api.create_collection("My family", namespace=ORGANISATION, private=True)
    assert api.create_collection("My family", namespace=ORGANISATION, exists_ok=True).slug == collection.slug
    for number in range(6):
        api.create_repo(f"org/m{number}")
        collection = api.add_collection_item(collection.slug, f"org/m{number}", "model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.add_collection_item(collection.slug, "org/m0", "model")
    with pytest.raises(HfHubHTTPError, match="404"):
        api.add_collection_item(collection.slug, "org/nothing", "model")
    api.update_collection_item(collection.slug, collection.items[5].item_object_id, position=0)
    found = api.get_collection(collection.slug)
    assert [each.item_id for each in found.items] == [f"org/m{number}" for number in (5, 0, 1, 2, 3, 4)]
    listed = list(api.list_collections(owner=ORGANISATION))
    assert [(each.slug, len(each.items), each.private) for each in listed] == [(collection.slug, 4, True)]
