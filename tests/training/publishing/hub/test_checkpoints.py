"""Every checkpoint of a run as its own revision: what it holds, and that no fault leaves half of one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from sentence_transformers import SentenceTransformer

from tests.hub_server import load_worker
from tests.hub_server.client import connected, environment
from tests.hub_server.server import TOKEN
from tests.hub_server.store import Repository
from tests.training.publishing.hub.test_upload import hold
from tests.training.recipes import write_recipe, write_single_stage
from training import publish
from training.publish import main
from training.publishing.hub import checkpoints
from training.publishing.hub.retries import RetryPolicy
from training.publishing.hub.upload_queue import UploadQueue
from training.run_stage import main as run_stage

pytestmark = pytest.mark.usefixtures("client_waits")

REPO = "org/tiny-checkpoints"
REVISIONS = ["stage1-step-000005", "stage1-step-000010"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("Hidden-Place")
    output = folder / "secret-run" / "stage1"
    assert run_stage([str(write_single_stage(folder, output_dir=str(output), save_steps=5, instructions=True))]) == 0
    return output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "stage1"))


def push(run: Path, *words: str) -> int:
    return main(["push-checkpoints", str(run), "--repo", REPO, *words])


def impatient() -> RetryPolicy:
    return RetryPolicy(tries=4, sleep=lambda seconds: None)


def revisions(repository: Repository) -> list[str]:
    return sorted(set(repository.branches) - {"main"})


def check_all_whole(repository: Repository) -> None:
    """At no time did a revision lack anything that it holds in the end."""
    assert revisions(repository) == REVISIONS
    for name, commit in repository.moves:
        if name in REVISIONS:
            assert commit == repository.branches[name]


def test_every_checkpoint_is_a_revision_without_the_state_of_its_optimizer(run, hub_server, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "correct-horse-battery")
    assert push(run) == 0
    repository = hub_server.repository(REPO)
    check_all_whole(repository)
    files = repository.files(REVISIONS[0])
    assert files["model.safetensors"] == (run / "checkpoint-5/model.safetensors").read_bytes()
    assert files["model.safetensors"] != repository.files(REVISIONS[1])["model.safetensors"]
    model = {path.relative_to(run / "model").as_posix() for path in (run / "model").rglob("*") if path.is_file()}
    added = {"README.md", "training_state.json"}
    assert {*files} - {".gitattributes"} == model - {"training_arguments.json"} | added

    state = json.loads(files["training_state.json"])
    assert (state["stage"], state["step"], state["max_steps"], state["epoch"]) == ("stage1", 5, 10, 1.0)
    logged = json.loads((run / "checkpoint-5/trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in state["log"] if "loss" in entry] == [
        entry["loss"] for entry in logged if "loss" in entry
    ]
    assert state["arguments"]["learning_rate"] == 1e-3 and "output_dir" not in state["arguments"]
    card = ModelCard(files["README.md"].decode())
    assert "intermediate-checkpoint" in card.data.tags
    assert f'SentenceTransformer("{REPO}", revision="{REVISIONS[0]}")' in card.text

    # Nothing private is uploaded.
    for name in ("main", *REVISIONS):
        for path, content in repository.files(name).items():
            for marker in ("Hidden-Place", "secret-run", str(run.parent), str(Path.home()), "correct-horse", TOKEN):
                assert marker.encode() not in content, (name, path, marker)


def test_the_main_branch_lists_the_revisions(run, hub_server):
    assert push(run) == 0
    repository = hub_server.repository(REPO)
    files = repository.files("main")
    assert {*files} - {".gitattributes"} == {"README.md", "checkpoints.json"}
    index = json.loads(files["checkpoints.json"])
    assert list(index["revisions"]) == REVISIONS
    logged = json.loads((run / "checkpoint-10/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    listed = index["revisions"][REVISIONS[1]]
    assert (listed["step"], listed["max_steps"], listed["loss"]) == (10, 10, losses[-1])
    assert all(f"| {name} | stage1 |" in files["README.md"].decode() for name in REVISIONS)

    # A second push changes nothing, even if a checkpoint is gone.
    commits = len(repository.commits)
    assert push(run) == 0
    shutil.rmtree(run / "checkpoint-5")
    assert push(run) == 0
    assert len(repository.commits) == commits


def test_what_was_pushed_loads_by_revision(run, hub_server, tmp_path):
    command = [sys.executable, "training/publish.py", "push-checkpoints", str(run), "--repo", REPO, "--private"]
    known = environment(hub_server, tmp_path / "home")
    ended = subprocess.run(command, env=known, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr and "holds 2 checkpoints" in ended.stdout
    output = tmp_path / "loaded.npz"
    words = [sys.executable, load_worker.__file__, str(output), REPO, REVISIONS[0]]
    done = subprocess.run(words, env=known, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    local = SentenceTransformer(str(run / "checkpoint-5"), device="cpu")
    np.testing.assert_array_equal(np.load(output)["sentences"], local.encode(load_worker.TEXTS))


def test_a_place_in_a_log_stops_before_anything_is_written(run, hub_server, capsys):
    path = run / "checkpoint-5/trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][0]["note"] = f"{run.absolute()}/somewhere"
    path.write_text(json.dumps(state))
    assert push(run) == 2
    assert "training_state.json would tell the place of run stage1" in capsys.readouterr().err
    assert revisions(hub_server.repository(REPO)) == []


@pytest.mark.parametrize(
    ("method", "path", "what"),
    [
        ("POST", "/commit/", {"status": 503, "times": 2}),
        ("POST", "/commit/", {"lose_answer": True}),
        ("POST", "/branch/stage1-step-000010$", {"status": 429, "retry_after": 1}),
        ("PUT", "storage", {"cut_after": 100}),
        ("GET", "/refs", {"status": 500}),
    ],
)
def test_faults_that_pass_cost_nothing(run, hub_server, monkeypatch, method, path, what):
    monkeypatch.setattr("training.publishing.hub.hub.RetryPolicy", impatient)
    fault = hub_server.faults.add(method, path, **what)
    assert push(run) == 0
    assert fault.met
    repository = hub_server.repository(REPO)
    check_all_whole(repository)
    assert list(json.loads(repository.files("main")["checkpoints.json"])["revisions"]) == REVISIONS


@pytest.mark.parametrize("place", ["/commit/stage1-step-000010", "/branch/stage1-step-000010$", "/commit/main"])
def test_what_a_hub_that_stays_down_interrupts_the_next_run_completes(run, hub_server, monkeypatch, capsys, place):
    monkeypatch.setattr("training.publishing.hub.hub.RetryPolicy", impatient)
    hub_server.faults.add("POST", place, times=None, status=503)
    assert push(run) == 1
    assert "the Hub is unavailable" in capsys.readouterr().err
    repository = hub_server.repository(REPO)
    assert all(repository.branches[name] for name in revisions(repository))
    hub_server.faults.clear()
    assert push(run) == 0
    check_all_whole(repository)
    assert not (run / ".upload_queue").exists()


def test_other_weights_are_not_replaced_unless_asked(run, hub_server, capsys):
    assert push(run) == 0
    shutil.copy(run / "checkpoint-10/model.safetensors", run / "checkpoint-5/model.safetensors")
    repository = hub_server.repository(REPO)
    before = dict(repository.branches)
    assert push(run) == 2
    assert "its revision stage1-step-000005 has other weights" in capsys.readouterr().err
    assert repository.branches == before
    assert push(run, "--replace") == 0
    assert repository.files(REVISIONS[0])["model.safetensors"] == repository.files(REVISIONS[1])["model.safetensors"]


def test_another_model_s_repository_is_refused(run, hub_server, tmp_path, capsys):
    other = write_single_stage(tmp_path / "other", output_dir=str(tmp_path / "other/stage1"), tokenizer_vocab_size=300)
    assert run_stage([str(other)]) == 0
    assert push(run) == 0
    assert push(tmp_path / "other/stage1") == 2
    assert "holds checkpoints of another stage 'stage1'" in capsys.readouterr().err
    assert push(tmp_path / "other/stage1", "--stage-name", "small") == 0
    assert "small-step-000010" in hub_server.repository(REPO).branches


def test_another_run_of_the_same_stage_is_refused_unless_asked(run, hub_server, tmp_path, capsys):
    keys = {"output_dir": str(tmp_path / "other/stage1"), "seed": 7, "save_steps": 4, "instructions": True}
    assert run_stage([str(write_single_stage(tmp_path / "other", **keys))]) == 0
    shutil.rmtree(tmp_path / "other/stage1/checkpoint-8")
    assert push(run) == 0
    repository = hub_server.repository(REPO)
    before = dict(repository.branches)
    assert push(tmp_path / "other/stage1") == 2
    assert "its revision stage1-step-000005 is of another run" in capsys.readouterr().err
    assert repository.branches == before
    assert push(tmp_path / "other/stage1", "--replace") == 0


def test_two_runs_that_list_at_once_are_both_listed(run, hub_server, monkeypatch):
    assert push(run, "--stage-name", "other") == 0
    index_files, once = checkpoints.index_files, []

    def files_after_another_commit(*known: object) -> object:
        listed = index_files(*known)
        if not once:
            # Another run's commit comes between reading the list and writing it.
            once.append(True)
            held = json.loads(hub_server.repository(REPO).files("main")["checkpoints.json"])
            held["revisions"]["third-step-000001"] = {"stage": "third", "step": 1, "max_steps": 1, "epoch": 1.0}
            HfApi().upload_file(
                path_or_fileobj=json.dumps(held).encode(), path_in_repo="checkpoints.json", repo_id=REPO
            )
        return listed

    monkeypatch.setattr(checkpoints, "index_files", files_after_another_commit)
    assert push(run) == 0
    listed = json.loads(hub_server.repository(REPO).files("main")["checkpoints.json"])["revisions"]
    assert {"third-step-000001", "other-step-000005", *REVISIONS} <= {*listed}


@pytest.mark.parametrize("pending", [[], ["checkpoint-5"], ["checkpoint-10"]])
def test_a_refused_push_leaves_what_was_pending_before(run, hub_server, pending):
    for name in pending:
        UploadQueue(run).add(run / name)
    hub_server.faults.add("POST", "/commit/", status=403)
    assert push(run) == 2
    assert [path.name for path in UploadQueue(run).pending()] == pending


@pytest.mark.slow
def test_a_push_that_is_killed_shows_nothing_and_the_next_completes(run, hub_server, kill_when_met):
    slow = hub_server.faults.add("PUT", "storage", delay=30, skip=1)
    kill_when_met(slow, publish.__file__, "push-checkpoints", str(run), "--repo", REPO)
    repository = hub_server.repository(REPO)
    assert revisions(repository) == [REVISIONS[0], f"{REVISIONS[1]}.partial"]
    hub_server.faults.clear()
    assert push(run) == 0
    check_all_whole(repository)
    assert not (run / ".upload_queue").exists()


def test_a_repository_of_something_else_is_refused(run, hub_server, capsys):
    hold(hub_server, {"weights.bin": b"x"}, REPO)
    assert push(run) == 2
    assert "holds 1 files that no checkpoints.json lists" in capsys.readouterr().err
    assert revisions(hub_server.repository(REPO)) == []


@pytest.mark.usefixtures("no_figures")
def test_the_finished_model_may_be_on_the_main_branch(run, hub_server, tmp_path):
    packed = tmp_path / "tiny-checkpoints"
    assert main(["pack", str(run), "--name", "tiny-checkpoints", "--output", str(packed)]) == 0
    assert main(["push", str(packed), "--repo", REPO]) == 0
    repository = hub_server.repository(REPO)
    released = repository.branches["main"]
    assert push(run) == 0
    assert repository.branches["main"] == released
    check_all_whole(repository)
    assert f"The finished model is [{REPO}]" in repository.files(REVISIONS[0])["README.md"].decode()


def test_all_stages_of_a_recipe_share_a_repository(hub_server, tmp_path):
    assert run_stage([str(write_recipe(tmp_path, num_train_epochs=1, save_strategy="epoch"))]) == 0
    assert push(tmp_path / "run") == 0
    repository = hub_server.repository(REPO)
    stages = {name.partition("-step-")[0] for name in revisions(repository)}
    assert stages == {"stage1", "stage2"} == {*json.loads(repository.files("main")["checkpoints.json"])["stages"]}


def test_a_dry_run_needs_neither_login_nor_network(run, hub_server, tmp_path, capsys):
    with connected(hub_server, tmp_path / "home", token=None):
        assert push(run, "--dry-run") == 0
    assert hub_server.log == []
    shown = capsys.readouterr().out
    assert all(f"revision {name}" in shown for name in REVISIONS)
    assert "  model.safetensors" in shown and "optimizer" not in shown
    cards = run.with_name("stage1.card.md")
    assert cards.read_text().count("**Not a finished model**") == len(REVISIONS)
    assert f"cards       {cards}\nNothing was uploaded.\n" in shown
    assert not (run / ".upload_queue").exists()


def test_a_pending_checkpoint_is_pushed_though_the_run_deleted_it(run, hub_server):
    UploadQueue(run).add(run / "checkpoint-5")
    shutil.rmtree(run / "checkpoint-5")
    assert push(run) == 0
    check_all_whole(hub_server.repository(REPO))
    assert not (run / ".upload_queue").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--repo", "tiny"], "it is not ORG/NAME"),
        (["{run}", "--repo", "org/tiny", "--stage-name", "a b"], "--stage-name 'a b': cannot name a revision"),
        (["{run}/nowhere", "--repo", "org/tiny"], "no such folder"),
        (["{run}/prepared", "--repo", "org/tiny"], "holds no checkpoint of a run"),
    ],
)
def test_bad_input_is_told_before_anything_is_done(run, capsys, words, message):
    assert main(["push-checkpoints", *(word.format(run=run) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_one_name_for_several_stages_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "all/one")
    shutil.copytree(run, tmp_path / "all/two")
    assert push(tmp_path / "all", "--stage-name", "x") == 2
    assert "--stage-name names one stage" in capsys.readouterr().err
