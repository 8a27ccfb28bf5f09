"""What all commands that upload share: under faults, a revision is whole or absent, and the next run completes it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub_server.client import connected
from tests.training.publishing.packed import NAME, content_of
from training import publish
from training.publish import main
from training.publishing.hub import hub

COMMANDS = ["push", "push-data", "push-family", "push-checkpoints"]


@dataclass(frozen=True)
class Command:
    words: list[str]
    large: Path  # a file that is uploaded
    repo: str
    kind: str = "model"


@pytest.fixture(params=COMMANDS)
def command(request, packed_run, tmp_path):
    if request.param == "push-checkpoints":
        run = Path(shutil.copytree(packed_run / "run", tmp_path / "run"))
        first = min(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return Command([request.param, str(run), "--repo", "org/run"], first / "model.safetensors", "org/run")
    data = request.param == "push-data"
    folder = request.getfixturevalue("released" if data else "packed")
    repo = "org/tiny-data" if data else f"org/{NAME}"
    where = {"push": ["--repo", repo, "--revision", "v1"], "push-family": ["--org", "org"]}
    words = [request.param, str(folder), *where.get(request.param, ["--repo", repo]), "--tag", "v1.0"]
    large = next(folder.glob("**/*.parquet" if data else "model.safetensors"))
    return Command(words, large, repo, "dataset" if data else "model")


def state_of(hub_server, command):
    """What is on the Hub by branch and tag, and the number of commits."""
    repository = hub_server.repository(command.repo, command.kind)
    refs = {**repository.branches, **repository.tags}
    for name, commit in repository.moves:
        if name != "main" and not name.endswith(".partial"):
            assert commit == refs[name], "a revision was there before it was whole"
    return {name: repository.files(name) for name in refs}, len(repository.commits), hub_server.store.collections


@pytest.fixture
def wanted(command, hub_server, waits):
    """What the command publishes without faults; then the Hub is empty again."""
    assert main(command.words) == 0
    wanted = state_of(hub_server, command)
    hub_server.store.repositories.clear()
    hub_server.store.collections = {}
    return wanted


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/commit/", {"status": 503, "times": 2}),
        ("POST", "/commit/", {"lose_answer": True}),
        ("POST", "/repos/create", {"status": 429, "retry_after": 1}),
        ("POST", "/(branch|tag)/", {"lose_answer": True}),
        ("PUT", "storage", {"cut_after": 100}),
        ("GET", "/refs", {"status": 500}),
    ],
)
def test_faults_that_pass_cost_nothing(command, wanted, hub_server, method, path, what):
    fault = hub_server.faults.add(method, path, **what)
    assert main(command.words) == 0
    assert fault.met and state_of(hub_server, command) == wanted


@pytest.mark.parametrize("path", ["/commit/", "storage", "/(branch|tag)/"])
def test_what_a_hub_that_stays_down_interrupts_the_next_run_completes(command, wanted, hub_server, capsys, path):
    fault = hub_server.faults.add("", path, times=None, status=503)
    assert main(command.words) == 1
    shown = capsys.readouterr()
    assert fault.met and "the Hub is unavailable" in shown.out + shown.err
    hub_server.faults.clear()
    assert main(command.words) == 0
    assert state_of(hub_server, command) == wanted


def test_a_dry_run_shows_all_and_needs_neither_login_nor_network(command, hub_server, tmp_path, capsys):
    folder = Path(command.words[1])
    before = content_of(folder)
    with connected(hub_server, tmp_path / "home", token=None):
        assert main([*command.words, "--dry-run", "--private"]) == 0
    shown, card = capsys.readouterr().out, folder.with_name(f"{folder.name}.card.md")
    kind, run = "datasets/" if command.kind == "dataset" else "", command.words[0] == "push-checkpoints"
    assert f"{command.large.stat().st_size:,}  " in shown and command.large.name in shown and "optimizer" not in shown
    assert f"to {hub_server.address}/{kind}{command.repo}, revision " in shown
    assert ("tag none" if run else "tag v1.0") in shown and "a new repository is private\n" in shown
    assert f"licence: {'not stated' if run else 'cc0-1.0' if kind else 'apache-2.0'}\n" in shown
    assert f"card: {card}\n" in shown and shown.endswith("Nothing was uploaded.\n")
    assert card.read_text().count("**Not a finished model**") == (len([*folder.glob("checkpoint-*")]) if run else 0)
    assert run or f'"{command.repo}"' in card.read_text()
    assert command.words[0] != "push-family" or f"collection 'F2LLM-v2' of org:\n1. {command.repo}\n" in shown
    assert content_of(folder) == before and hub_server.log == []


def assert_nothing_visible(hub_server, command):
    repository = hub_server.repository(command.repo, command.kind)
    assert repository.files() == {} and not repository.tags
    assert all(name == "main" or name.endswith(".partial") for name in repository.branches)


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("push-data", "push-checkpoints")]


@pytest.mark.parametrize("command", ["push", "push-family", *_SLOW], indirect=True)
def test_a_killed_command_leaves_nothing_visible_and_the_next_completes(command, wanted, hub_server, kill_when_met):
    slow = hub_server.faults.add("PUT", "storage", delay=60)
    kill_when_met(slow, publish.__file__, *command.words)
    assert_nothing_visible(hub_server, command)
    assert main(command.words) == 0
    assert state_of(hub_server, command) == wanted


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture
def meanwhile(monkeypatch):
    """Changes a file, without changing its size, between its upload and the commit. A kilobyte counts as large."""
    monkeypatch.setattr("training.common.hub.LARGE_BYTES", 1000)
    check = hub.check_unchanged

    def change(path):
        def changed(files):
            flip(path)
            check(files)

        monkeypatch.setattr(hub, "check_unchanged", changed)

    return change


def test_a_large_file_that_changes_is_not_published(command, wanted, hub_server, meanwhile, capsys):
    if command.words[0] != "push-checkpoints":
        # Changed before: found by its hash.
        flip(command.large)
        for more in ([], ["--dry-run"]):
            assert main([*command.words, *more]) == 2
            assert f"{command.large.name} is not as release.json says" in capsys.readouterr().err
        assert hub_server.store.repositories == {}
        flip(command.large)
    meanwhile(command.large)
    assert main(command.words) == (1 if command.words[0] == "push-family" else 2)
    shown = capsys.readouterr()
    assert f"{command.large.name}: was changed while it was uploaded" in shown.out + shown.err
    assert_nothing_visible(hub_server, command)


@pytest.mark.parametrize("command", ["push"], indirect=True)
def test_a_small_file_is_published_as_it_was_hashed(command, wanted, hub_server, meanwhile):
    small = command.large.with_name("1_Pooling") / "config.json"
    before = small.read_bytes()
    meanwhile(small)
    assert main(command.words) == 0
    assert hub_server.repository(command.repo).files("v1")["1_Pooling/config.json"] == before != small.read_bytes()
