"""Every checkpoint of a run as its own revision: what it holds, and what is refused (faults: ``test_faults.py``)."""

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
from tests.hub_server.client import environment
from tests.hub_server.server import TOKEN
from tests.training.publishing.hub.test_upload import hold
from tests.training.publishing.packed import content_of
from tests.training.recipes import write_recipe, write_single_stage
from training.publish import main
from training.publishing.hub import checkpoints
from training.publishing.hub.checkpoints import PushQueue
from training.run_stage import main as run_stage

pytestmark = pytest.mark.usefixtures("client_waits")

REPO = "org/tiny-checkpoints"
REVISIONS = ["stage1-step-000005", "stage1-step-000010"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Hidden-Place")
    output = folder / "secret-run" / "stage1"
    assert run_stage([str(write_single_stage(folder, output_dir=str(output), save_steps=5, instructions=True))]) == 0
    return output


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "stage1"))


def push(run, *words):
    return main(["push-checkpoints", str(run), "--repo", REPO, *words])


def revisions(repository):
    return sorted(set(repository.branches) - {"main"})


def test_every_checkpoint_is_a_revision_and_listed(run, hub_server, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "correct-horse-battery")
    assert push(run) == 0
    repository = hub_server.repository(REPO)
    assert revisions(repository) == REVISIONS
    files = repository.files(REVISIONS[0])
    assert files["model.safetensors"] == (run / "checkpoint-5/model.safetensors").read_bytes()
    assert files["model.safetensors"] != repository.files(REVISIONS[1])["model.safetensors"]
    # Without the state of the optimizer.
    assert {*files} == {*content_of(run / "model")} - {"training_arguments.json"} | {"README.md", "training_state.json"}

    state = json.loads(files["training_state.json"])
    assert (state["stage"], state["step"], state["max_steps"], state["epoch"]) == ("stage1", 5, 10, 1.0)
    losses = losses_of(run / "checkpoint-5")
    assert [entry["loss"] for entry in state["log"] if "loss" in entry] == losses
    assert state["arguments"]["learning_rate"] == 1e-3 and "output_dir" not in state["arguments"]
    card = ModelCard(files["README.md"].decode())
    assert "intermediate-checkpoint" in card.data.tags
    assert f'SentenceTransformer("{REPO}", revision="{REVISIONS[0]}")' in card.text

    main_files = repository.files("main")
    assert {*main_files} == {"README.md", "checkpoints.json"}
    index = json.loads(main_files["checkpoints.json"])["revisions"]
    assert list(index) == REVISIONS
    listed = index[REVISIONS[1]]
    assert (listed["step"], listed["max_steps"], listed["train_loss"]) == (10, 10, losses_of(run / "checkpoint-10")[-1])
    table = main_files["README.md"].decode()
    assert all(
        f"| {name} | stage1 |" in table and f"| {index[name]['train_loss']:.4g} |" in table for name in REVISIONS
    )

    # Nothing private is uploaded.
    for name in ("main", *REVISIONS):
        for path, content in repository.files(name).items():
            for marker in ("Hidden-Place", "secret-run", str(run.parent), str(Path.home()), "correct-horse", TOKEN):
                assert marker.encode() not in content, (name, path, marker)

    # A second push changes nothing, even if a checkpoint is gone.
    commits = len(repository.commits)
    shutil.rmtree(run / "checkpoint-5")
    assert push(run) == 0
    assert len(repository.commits) == commits


def losses_of(checkpoint):
    logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in logged if "loss" in entry]


def test_what_was_pushed_loads_by_revision(run, hub_server, tmp_path):
    command = [sys.executable, "training/publish.py", "push-checkpoints", str(run), "--repo", REPO, "--private"]
    known = environment(hub_server, tmp_path / "home")
    ended = subprocess.run(command, env=known, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr and all(f"uploaded {name}" in ended.stdout for name in REVISIONS)
    output = tmp_path / "loaded.npz"
    words = [sys.executable, load_worker.__file__, str(output), REPO, REVISIONS[0]]
    done = subprocess.run(words, env=known, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    local = SentenceTransformer(str(run / "checkpoint-5"), device="cpu")
    np.testing.assert_array_equal(np.load(output)["sentences"], local.encode(load_worker.TEXTS))


def test_a_path_in_a_log_stops_before_anything_is_written(run, hub_server, capsys):
    path = run / "checkpoint-5/trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][0]["note"] = f"{run.absolute()}/somewhere"
    path.write_text(json.dumps(state))
    assert push(run) == 2
    assert "training_state.json would tell the place of run stage1" in capsys.readouterr().err
    assert revisions(hub_server.repository(REPO)) == []


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


@pytest.mark.parametrize("keys", [{"tokenizer_vocab_size": 300}, {"seed": 7, "save_steps": 4}])
def test_another_run_of_this_name_is_refused_unless_asked(run, hub_server, tmp_path, capsys, keys):
    other = tmp_path / "other/stage1"
    assert run_stage([str(write_single_stage(tmp_path / "other", **{"output_dir": str(other), **keys}))]) == 0
    assert push(run) == 0
    repository = hub_server.repository(REPO)
    before = dict(repository.branches)
    assert push(other) == 2
    shown = capsys.readouterr().err
    assert "its revision stage1-step-000005 is of another run" in shown and "--stage-name" in shown
    assert repository.branches == before
    assert push(other, "--stage-name", "small") == 0
    assert "small-step-000010" in repository.branches
    assert push(other, "--replace") == 0


def test_two_runs_that_list_at_once_are_both_listed(run, hub_server, monkeypatch):
    assert push(run, "--stage-name", "other") == 0
    index_files, once = checkpoints.index_files, []

    def files_after_another_commit(*known):
        listed = index_files(*known)
        if not once:
            # Another run's commit comes between reading the list and writing it.
            once.append(True)
            held = json.loads(hub_server.repository(REPO).files("main")["checkpoints.json"])
            held["revisions"]["third-step-000001"] = {"stage": "third", "step": 1, "max_steps": 1, "epoch": 1.0}
            content = json.dumps(held).encode()
            HfApi().upload_file(path_or_fileobj=content, path_in_repo="checkpoints.json", repo_id=REPO)
        return listed

    monkeypatch.setattr(checkpoints, "index_files", files_after_another_commit)
    assert push(run) == 0
    listed = json.loads(hub_server.repository(REPO).files("main")["checkpoints.json"])["revisions"]
    assert {"third-step-000001", "other-step-000005", *REVISIONS} <= {*listed}


def test_a_pending_checkpoint_is_pushed_though_the_run_deleted_it(run, hub_server):
    PushQueue(run).add(run / "checkpoint-5")
    shutil.rmtree(run / "checkpoint-5")
    hub_server.faults.add("POST", "/commit/", status=403)
    assert push(run) == 2
    assert [path.name for path in PushQueue(run).pending()] == ["checkpoint-5"]
    assert push(run) == 0
    assert revisions(hub_server.repository(REPO)) == REVISIONS
    assert not (run / ".upload_queue").exists()


def test_a_repository_of_something_else_is_refused(run, hub_server, capsys):
    hold(hub_server, {"weights.bin": b"x"}, REPO)
    assert push(run) == 2
    assert "holds 1 files that no checkpoints.json lists" in capsys.readouterr().err
    assert revisions(hub_server.repository(REPO)) == []


@pytest.mark.usefixtures("no_figures")
def test_the_finished_model_may_be_on_the_main_branch(run, hub_server, tmp_path, capsys):
    packed = tmp_path / "tiny-checkpoints"
    assert main(["pack", str(run), "--name", "tiny-checkpoints", "--output", str(packed)]) == 0
    assert main(["push", str(packed), "--repo", REPO]) == 0
    repository = hub_server.repository(REPO)
    released = repository.branches["main"]
    assert push(run) == 0
    assert repository.branches["main"] == released and revisions(repository) == REVISIONS
    assert f"The finished model is [{REPO}]" in repository.files(REVISIONS[0])["README.md"].decode()
    assert push(run, "--stage-name", "other") == 2
    assert "a model that was made without a stage 'other'" in capsys.readouterr().err


def test_all_stages_of_a_recipe_share_a_repository(hub_server, tmp_path, capsys):
    assert run_stage([str(write_recipe(tmp_path, num_train_epochs=1, save_strategy="epoch"))]) == 0
    assert push(tmp_path / "run", "--stage-name", "x") == 2
    assert "--stage-name names one stage" in capsys.readouterr().err
    assert push(tmp_path / "run") == 0
    repository = hub_server.repository(REPO)
    listed = json.loads(repository.files("main")["checkpoints.json"])["revisions"]
    assert {*listed} == {*revisions(repository)}
    assert {name.partition("-step-")[0] for name in listed} == {"stage1", "stage2"}


@pytest.mark.parametrize(
    ("folder", "words", "message"),
    [
        ("", ["--stage-name", "a b"], "--stage-name 'a b': cannot name a revision"),
        ("prepared", [], "holds no checkpoint of a run"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(run, hub_server, capsys, folder, words, message):
    assert push(run / folder, *words) == 2
    assert message in capsys.readouterr().err and hub_server.log == []
