"""Releasing a family: repositories, a collection in order and cards that link each other, even after faults."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.hub_server.load_worker import TEXTS
from tests.training.publishing.hub.test_upload import hold
from tests.training.publishing.packed import spoil
from tests.training.publishing.releases import make_release
from training.publish import main
from training.publishing.hub.upload import stage_links
from training.publishing.pack import PackOptions, pack

pytestmark = pytest.mark.usefixtures("waits")

NAMES = ("small", "middle", "large")
REPOS = [f"org/{name}" for name in NAMES]


@pytest.fixture(scope="module")
def packed_once(packed_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    for name in NAMES:
        pack(packed_run / "run", folder / name, PackOptions(name))
    return folder


@pytest.fixture
def members(packed_once, tmp_path):
    shutil.copytree(packed_once, tmp_path / "members")
    return [str(tmp_path / "members" / name) for name in NAMES]


def push(members, *words):
    return main(["push-family", *members, "--org", "org", *words])


def card(hub_server, repo):
    return hub_server.repository(repo).files()["README.md"].decode()


def check_whole(hub_server):
    """Each member was uploaded in one commit, with links to the others; the collection holds them in order."""
    (collection,) = hub_server.store.collections.values()
    assert [item["id"] for item in collection["items"]] == REPOS
    for repo in REPOS:
        repository = hub_server.repository(repo)
        assert [commit.title for commit in repository.commits.values()][1:] == [f"Release {repo[4:]}"]
        text = card(hub_server, repo)
        assert f"collections/{collection['slug']})" in text
        for other in REPOS:
            assert (f"[{other}](https://huggingface.co/{other})" in text) == (other != repo)
        assert json.loads(repository.files()["release.json"])["files"]["README.md"] == len(text.encode())


def test_a_family_is_released_once_and_loads_back(members, hub_server, load_back, capsys):
    words = ["--tag", "v1.0", "--data", "org/corpus", "--collection", "Tiny models"]
    assert push(members, *words) == 0
    check_whole(hub_server)
    (collection,) = hub_server.store.collections.values()
    assert (collection["title"], collection["owner"], collection["private"]) == ("Tiny models", "org", False)
    for repo in REPOS:
        assert "- org/corpus" in card(hub_server, repo) and hub_server.repository(repo).tags.keys() == {"v1.0"}
    assert f"collections/{collection['slug']}\n" in capsys.readouterr().out

    hub_server.log.clear()
    assert push(members, *words) == 0
    # The collection is asked for by its title.
    writes = [each for each in hub_server.log if each.method not in ("GET", "HEAD") and "yaml" not in each.path]
    assert [(each.method, each.path, each.status) for each in writes] == [("POST", "/api/collections", 409)]
    assert capsys.readouterr().out.count("nothing to change") == 3

    local = SentenceTransformer(members[1], device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(load_back(REPOS[1], "main")["sentences"], local)


def test_the_collection_takes_the_order_given_and_keeps_what_else_is_in_it(members, hub_server):
    assert push(members[:2], "--no-verify") == 0
    (collection,) = hub_server.store.collections.values()
    collection["items"].append({"_id": "c", "type": "dataset", "id": "org/corpus", "position": 2})
    assert push(members[::-1], "--no-verify") == 0
    assert [item["id"] for item in collection["items"]] == [*REPOS[::-1], "org/corpus"]
    # The new member is linked by those that were there.
    assert all("[org/large]" in card(hub_server, repo) for repo in REPOS[:2])


def test_a_private_family_has_a_private_collection_and_no_public_one(members, hub_server, capsys):
    assert push(members[:1], "--no-verify") == 0
    assert push(members[1:], "--private") == 2
    assert "is public" in capsys.readouterr().err
    assert len(hub_server.store.repositories) == 1
    assert push(members[1:], "--private", "--no-verify", "--collection", "Hidden") == 0
    assert all(hub_server.repository(repo).private for repo in REPOS[1:])
    assert [each["private"] for each in hub_server.store.collections.values()] == [False, True]


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("fault", "1_Pooling/config.json"),
        ("unpacked", "pack it"),
        ("twice", "is; pack one under another --name"),
        ("other", "release.json"),
        ("--org stranger", "this login may not do it"),
        ("--data corpus", "--data 'corpus'"),
    ],
)
def test_what_is_wrong_with_the_last_member_is_found_before_the_first_write(members, hub_server, capsys, fault, part):
    last, words = Path(members[2]), fault.split() if fault.startswith("--") else []
    if fault == "fault":
        spoil(last)
    elif fault == "unpacked":
        (last / "release.json").unlink()
    elif fault == "twice":
        members = [*members, members[0]]
    elif fault == "other":
        hold(hub_server, {"config.json": b"{}"}, REPOS[2])
    held = dict(hub_server.store.repositories)
    assert push(members, *words) == 2
    shown = capsys.readouterr().err
    assert part in shown and len(shown.splitlines()) == 1
    assert hub_server.store.repositories == held and hub_server.store.collections == {}
    # A fault is ignored, and another model replaced, when asked.
    if fault in ("fault", "other"):
        assert push(members, "--replace", "--no-verify") == 0
        assert "model.safetensors" in hub_server.repository(REPOS[2]).files()


@pytest.mark.parametrize(
    ("path", "what"),
    [
        *((path, {"lose_answer": True}) for path in ("/api/collections$", "/items$")),
        *((path, {"status": 503, "times": None}) for path in ("/models/org/middle/", "/items", "/api/collections")),
    ],
)
def test_a_fault_leaves_no_trace_or_is_gone_on_with_by_the_next_run(members, hub_server, path, what):
    fault = hub_server.faults.add("POST", path, **what)
    assert push(members, "--no-verify") == int("times" in what)
    assert fault.met
    if "times" in what:
        hub_server.faults.clear()
        assert push(members, "--no-verify") == 0
    check_whole(hub_server)


@pytest.mark.parametrize("target", ["/repos/create", "/models/org/middle/commit"])
def test_a_member_that_fails_does_not_keep_the_others_back(members, hub_server, capsys, target):
    creating = target == "/repos/create"
    hub_server.faults.add("POST", target, times=1 if creating else None, skip=int(creating), status=403)
    assert push(members, "--no-verify") == 1
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.partition("missing, ")[2].splitlines()[1:]] == ["org/middle"]
    for repo in (REPOS[0], REPOS[2]):
        assert "model.safetensors" in hub_server.repository(repo).files()
    hub_server.faults.clear()
    assert push(members, "--no-verify") == 0
    check_whole(hub_server)


def test_a_stage_is_linked_only_if_it_is_the_one_that_made_the_member():
    own = make_release()
    base, other = own.stages[:1], (replace(own.stages[0], steps=21),)
    stages = {"org/own": own.stages, "org/base": base, "org/other": other}
    members = {repo: make_release(stages=each) for repo, each in stages.items()}
    assert stage_links(own, members) == {"stage1": "org/base"} and stage_links(members["org/base"], members) == {}
