"""Releasing a family: repositories, a collection in order and cards that link each other, even after faults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.hub_server import load_worker
from tests.hub_server.client import connected, environment
from tests.hub_server.server import READ_TOKEN, HubServer
from tests.training.publishing.packed import spoil
from tests.training.publishing.releases import make_release
from training import publish
from training.publish import main
from training.publishing.hub import family
from training.publishing.hub.family import Member, stage_links
from training.publishing.hub.hub import Hub
from training.publishing.hub.retries import RetryPolicy
from training.publishing.hub.upload import Destination
from training.publishing.pack import PackOptions, pack

pytestmark = pytest.mark.usefixtures("client_waits")

NAMES = ("small", "middle", "large")
REPOS = [f"org/{name}" for name in NAMES]


@pytest.fixture(scope="module")
def packed_once(packed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    for name in NAMES:
        pack(packed_run / "run", folder / name, PackOptions(name))
    return folder


@pytest.fixture
def members(packed_once: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(packed_once, tmp_path / "members")
    return [str(tmp_path / "members" / name) for name in NAMES]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries as often as always, and does not wait in between."""
    monkeypatch.setattr(family, "Hub", lambda: Hub(retries=RetryPolicy(sleep=lambda seconds: None)))


def push(members: list[str], *words: str) -> int:
    return main(["push-family", *members, "--org", "org", *words])


def card(hub_server: HubServer, repo: str) -> str:
    return hub_server.repository(repo).files()["README.md"].decode()


def check_whole(hub_server: HubServer, repos: list[str] = REPOS) -> None:
    """Each member was uploaded in one commit, with links to the others; the collection holds them in order."""
    (collection,) = hub_server.store.collections.values()
    assert [item["id"] for item in collection["items"]] == repos
    for repo in repos:
        repository = hub_server.repository(repo)
        assert [commit.title for commit in repository.commits.values()][1:] == [f"Release {repo[4:]}"]
        text = card(hub_server, repo)
        assert f"collections/{collection['slug']})" in text
        for other in repos:
            assert (f"[{other}](https://huggingface.co/{other})" in text) == (other != repo)
        assert json.loads(repository.files()["release.json"])["files"]["README.md"] == len(text.encode())


def writes(hub_server: HubServer) -> list[str]:
    asking = ("validate-yaml",)
    return [
        f"{each.method} {each.path}"
        for each in hub_server.log
        if each.method not in ("GET", "HEAD") and not each.path.endswith(asking)
    ]


def test_a_family_is_released_once(members, hub_server, capsys):
    words = ["--tag", "v1.0", "--data", "org/corpus", "--collection", "Tiny models"]
    assert push(members, *words) == 0
    check_whole(hub_server)
    (collection,) = hub_server.store.collections.values()
    assert (collection["title"], collection["owner"], collection["private"]) == ("Tiny models", "org", False)
    assert all("- org/corpus" in card(hub_server, repo) for repo in REPOS)
    assert all(hub_server.repository(repo).tags.keys() == {"v1.0"} for repo in REPOS)
    assert f"collections/{collection['slug']}: updated" in capsys.readouterr().out

    hub_server.log.clear()
    assert push(members, *words) == 0
    assert writes(hub_server) == []
    assert capsys.readouterr().out.count("nothing to change") == 4


def test_the_collection_takes_the_order_given_and_keeps_what_else_is_in_it(members, hub_server):
    assert push(members[:2], "--no-verify") == 0
    (collection,) = hub_server.store.collections.values()
    hub_server.store.create("dataset", "org/corpus")
    corpus = {"_id": "c", "type": "dataset", "id": "org/corpus", "position": 2}
    collection["items"].append(corpus)
    assert push(members[::-1], "--no-verify") == 0
    assert [item["id"] for item in collection["items"]] == [*REPOS[::-1], "org/corpus"]
    # The new member is linked by those that were there.
    assert all("[org/large]" in card(hub_server, repo) for repo in REPOS[:2])


def test_a_private_family_has_a_private_collection(members, hub_server):
    assert push(members, "--private", "--no-verify") == 0
    assert all(hub_server.repository(repo).private for repo in REPOS)
    assert [each["private"] for each in hub_server.store.collections.values()] == [True]
    # Found again, though it is private.
    assert push(members) == 0
    check_whole(hub_server)


def test_a_public_collection_is_not_given_a_private_family(members, hub_server, capsys):
    assert push(members[:1]) == 0
    hub_server.log.clear()
    assert push(members[1:], "--private") == 2
    assert "is public" in capsys.readouterr().err
    assert writes(hub_server) == []


def test_a_dry_run_needs_neither_login_nor_network(members, hub_server, tmp_path, capsys):
    with connected(hub_server, tmp_path / "home", token=None):
        assert push(members, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert hub_server.log == []
    for folder, repo in zip(members, REPOS, strict=True):
        assert f"{(Path(folder) / 'model.safetensors').stat().st_size:,}  model.safetensors" in shown
        assert f"+++ {repo}/README.md" in shown
    assert shown.count("\n+| [org/small]") == 2
    assert "\ncollection 'F2LLM-v2' of org:\n1. org/small\n2. org/middle\n3. org/large\n\nupload " in shown
    summary = shown.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in summary] == [
        *("upload", "licence", "tag", "visibility", "card") * 3,
        *("checks", "Nothing"),
    ]
    assert all(
        f'"{repo}"' in Path(f"{folder}.card.md").read_text() for folder, repo in zip(members, REPOS, strict=True)
    )


@pytest.mark.parametrize("fault", ["fault", "unpacked", "twice", "org", "title", "dataset", "other", "tag", "data"])
def test_what_is_wrong_with_the_last_member_is_found_before_the_first_write(members, hub_server, capsys, fault):
    words, part = [], ""
    if fault == "fault":
        spoil(Path(members[2]))
        part = "1_Pooling/config.json"
    elif fault == "unpacked":
        (Path(members[2]) / "release.json").unlink()
        part = "pack it"
    elif fault == "twice":
        members, part = [*members, members[0]], "as " + members[0] + " is"
    elif fault == "org":
        words, part = ["--org", "stranger"], "--org stranger: ada"
    elif fault == "title":
        words, part = ["--collection", "x" * 61], "60 characters"
    elif fault == "data":
        words, part = ["--data", "corpus"], "--data 'corpus'"
    elif fault == "dataset":
        hub_server.store.create("dataset", REPOS[2])
        part = "is a dataset"
    else:
        repository = hub_server.store.create("model", REPOS[2])
        held = {"config.json": repository.add_blob(b"{}")}
        repository.commit("main", "theirs", held, [])
        part = "release.json"
        if fault == "tag":
            repository.tags["v1"] = repository.branches["main"]
            repository.commit("main", "empty", {}, ["config.json"])
            words, part = ["--tag", "v1"], "tag v1"
    assert push(members, *words) == 2
    shown = capsys.readouterr().err
    assert part in shown
    assert len(shown.splitlines()) == 1
    assert writes(hub_server) == []
    assert hub_server.store.collections == {}


@pytest.mark.parametrize(("token", "part"), [(READ_TOKEN, "may only read"), (None, "not logged in")])
def test_a_login_that_may_not_write_is_refused(members, hub_server, tmp_path, capsys, token, part):
    with connected(hub_server, tmp_path / "home", token=token):
        assert push(members) == 2
    assert part in capsys.readouterr().err
    assert writes(hub_server) == []


def test_faults_are_ignored_and_another_model_is_replaced_when_asked(members, hub_server):
    spoil(Path(members[2]))
    repository = hub_server.store.create("model", REPOS[1])
    repository.commit("main", "theirs", {"config.json": repository.add_blob(b"{}")}, [])
    assert push(members, "--replace", "--no-verify") == 0
    assert "model.safetensors" in repository.files() and "config.json" in hub_server.repository(REPOS[2]).files()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/repos/create", {"status": 503}),
        ("POST", "/api/collections$", {"status": 503}),
        ("POST", "/api/collections$", {"lose_answer": True}),
        ("POST", "/items$", {"lose_answer": True}),
        ("POST", "/items$", {"status": 429, "retry_after": 1}),
        ("POST", "/commit/", {"lose_answer": True}),
        ("PUT", "storage", {"cut_after": 10}),
    ],
)
def test_a_fault_that_passes_leaves_no_trace(members, hub_server, method, path, what):
    fault = hub_server.faults.add(method, path, **what)
    assert push(members, "--no-verify") == 0
    assert fault.met
    check_whole(hub_server)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("path", ["/models/org/middle/", "/models/org/middle/commit", "/items", "/api/collections"])
def test_a_hub_that_goes_down_on_the_way_is_gone_on_with_by_the_next_run(members, hub_server, path):
    fault = hub_server.faults.add("POST", path, times=None, status=503)
    assert push(members, "--no-verify") == 1
    assert fault.met
    hub_server.faults.clear()
    assert push(members, "--no-verify") == 0
    check_whole(hub_server)


@pytest.mark.usefixtures("impatient")
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


def test_a_release_that_is_killed_is_completed_by_the_next_and_loads_back(members, hub_server, tmp_path, kill_when_met):
    slow = hub_server.faults.add("PUT", "storage/models/org/middle", delay=60)
    kill_when_met(slow, publish.__file__, "push-family", *members, "--org", "org", "--no-verify")
    assert hub_server.repository(REPOS[1]).files() == {}
    assert push(members, "--no-verify") == 0
    check_whole(hub_server)

    command = [sys.executable, load_worker.__file__, str(tmp_path / "loaded.npz"), REPOS[1], "main"]
    done = subprocess.run(
        command, env=environment(hub_server, tmp_path / "home"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    local = SentenceTransformer(members[1], device="cpu").encode(load_worker.TEXTS)
    np.testing.assert_array_equal(np.load(tmp_path / "loaded.npz")["sentences"], local)


def test_a_stage_is_linked_only_if_it_is_the_one_that_made_the_member():
    own = make_release()
    base = make_release(name="base", stages=own.stages[:1])
    other = make_release(name="other", stages=(replace(own.stages[0], steps=21),))
    members = [Member(Path(), each, Destination(f"org/{each.name}")) for each in (own, base, other)]
    assert stage_links(own, members) == {"stage1": "org/base"}
    assert stage_links(base, members) == {}
