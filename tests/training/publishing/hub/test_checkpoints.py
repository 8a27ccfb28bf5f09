"""Every checkpoint of a run as its own revision, what is refused, and the queue (faults: ``test_faults.py``)."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from tests.hub_server.load_worker import TEXTS
from tests.hub_server.server import TOKEN
from tests.training.publishing.hub.test_upload import hold
from tests.training.publishing.packed import content_of
from tests.training.recipes import write_recipe, write_single_stage
from training.common.errors import UserError
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
    # Without the state of the optimizer.
    assert {*files} == {*content_of(run / "model")} - {"training_arguments.json"} | {"README.md", "training_state.json"}

    state = json.loads(files["training_state.json"])
    assert (state["stage"], state["step"], state["max_steps"], state["epoch"]) == ("stage1", 5, 10, 1.0)
    losses = losses_of(run / "checkpoint-5")
    assert [entry["loss"] for entry in state["log"] if "loss" in entry] == losses
    assert state["arguments"]["learning_rate"] == 1e-3 and "output_dir" not in state["arguments"]
    assert f'SentenceTransformer("{REPO}", revision="{REVISIONS[0]}")' in files["README.md"].decode()

    main_files = repository.files("main")
    assert {*main_files} == {"README.md", "checkpoints.json"}
    index = json.loads(main_files["checkpoints.json"])["revisions"]
    listed = index[REVISIONS[1]]
    assert list(index) == REVISIONS
    assert (listed["step"], listed["max_steps"], listed["train_loss"]) == (10, 10, losses_of(run / "checkpoint-10")[-1])
    table = main_files["README.md"].decode()
    assert all(f"| {name} | stage1 |" in table for name in REVISIONS) and f"| {listed['train_loss']:.4g} |" in table

    # Nothing private is uploaded.
    private = ("Hidden-Place", "secret-run", str(run.parent), str(Path.home()), "correct-horse", TOKEN)
    for path, content in [item for name in ("main", *REVISIONS) for item in repository.files(name).items()]:
        assert not [marker for marker in private if marker.encode() in content], path

    # A second push changes nothing, even if a checkpoint is gone.
    commits = len(repository.commits)
    shutil.rmtree(run / "checkpoint-5")
    assert push(run) == 0
    assert len(repository.commits) == commits


def losses_of(checkpoint):
    logged = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in logged if "loss" in entry]


def test_what_was_pushed_loads_by_revision(run, run_python, load_back):
    printed = run_python("training/publish.py", "push-checkpoints", run, "--repo", REPO, "--private")
    assert TOKEN not in printed and all(f"uploaded {name}" in printed for name in REVISIONS)
    local = SentenceTransformer(str(run / "checkpoint-5"), device="cpu")
    np.testing.assert_array_equal(load_back(REPO, REVISIONS[0])["sentences"], local.encode(TEXTS))


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
    index_files = checkpoints.index_files

    def files_after_another_run(*known):
        # Another run's commits come between reading the list and writing it.
        monkeypatch.setattr(checkpoints, "index_files", index_files)
        listed = index_files(*known)
        assert push(run, "--stage-name", "third") == 0
        return listed

    monkeypatch.setattr(checkpoints, "index_files", files_after_another_run)
    assert push(run) == 0
    listed = json.loads(hub_server.repository(REPO).files("main")["checkpoints.json"])["revisions"]
    assert {"third-step-000005", "other-step-000005", *REVISIONS} <= {*listed}


def test_a_pending_checkpoint_is_pushed_though_the_run_deleted_it(run, hub_server):
    PushQueue(run).add(run / "checkpoint-5")
    shutil.rmtree(run / "checkpoint-5")
    hub_server.faults.add("POST", "/commit/", status=403)
    assert push(run) == 2
    assert [path.name for path in PushQueue(run).pending()] == ["checkpoint-5"]
    assert push(run) == 0
    assert revisions(hub_server.repository(REPO)) == REVISIONS
    assert not (run / ".upload_queue").exists()


def test_a_repository_of_something_else_and_a_path_in_a_log_are_refused(run, hub_server, capsys):
    repository = hold(hub_server, {"weights.bin": b"x"}, REPO)
    assert push(run) == 2
    assert "holds 1 files that no checkpoints.json lists" in capsys.readouterr().err
    state = json.loads((run / "checkpoint-5/trainer_state.json").read_text())
    state["log_history"][0]["note"] = f"{run.absolute()}/somewhere"
    (run / "checkpoint-5/trainer_state.json").write_text(json.dumps(state))
    assert push(run, "--replace") == 2
    assert "training_state.json would tell the place of run stage1" in capsys.readouterr().err
    assert revisions(repository) == []


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


def test_bad_input_is_refused_before_anything_is_done(run, hub_server, capsys):
    assert push(run, "--stage-name", "a b") == 2 and push(run / "prepared") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "--stage-name 'a b': cannot name a revision" in first and "holds no checkpoint of a run" in second
    assert hub_server.log == []


# The queue of a run

MODEL = {"config.json", "model.safetensors", "modules.json", "tokenizer.json", "1_Pooling/config.json"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "QUEUE_LIMIT", 3)
    return PushQueue(tmp_path)


def write_checkpoint(run, step):
    folder = run / f"checkpoint-{step}"
    for name in (*MODEL, *STATE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    return folder


def test_a_checkpoint_is_kept_without_its_optimizer_and_outlives_its_run(queue, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 7)
    queued = queue.add(checkpoint)
    assert content_of(queued).keys() == {*MODEL, "trainer_state.json"}
    assert os.path.samefile(queued / "model.safetensors", checkpoint / "model.safetensors")
    shutil.rmtree(checkpoint)
    assert (queued / "model.safetensors").read_text() == "model.safetensors of step 7"
    # That another process removed it is no error.
    PushQueue(tmp_path).remove(queued)
    queue.remove(queued)
    assert queue.pending() == [] and not queue.folder.exists()


def test_the_oldest_comes_first_and_a_full_queue_stays_as_it_is(queue, tmp_path):
    for step in (100, 20, 3):
        assert queue.add(write_checkpoint(tmp_path, step)) == queue.add(tmp_path / f"checkpoint-{step}")
    # What killed processes left.
    for left in (".checkpoint-5.partial", ".checkpoint-6.discarded"):
        (queue.folder / left).mkdir()
        (queue.folder / left / "model.safetensors").write_text("weights")
    pending = ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert [path.name for path in queue.pending()] == pending
    with pytest.raises(UserError, match="3 checkpoints are in the queue already"):
        queue.add(write_checkpoint(tmp_path, 200))
    assert [path.name for path in queue.pending()] == pending
    queue.tidy()
    assert {path.name for path in queue.folder.iterdir()} == {*pending}


def test_the_disk_keeps_room_for_the_next_checkpoint(queue, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, 7)
    sizes = {name: len(content) for name, content in content_of(checkpoint).items()}
    needed = sum(sizes.values()) + sum(sizes[name] for name in (*MODEL, "trainer_state.json"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="must be free"):
        queue.add(checkpoint)
    assert queue.pending() == [] and not queue.folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    assert queue.add(checkpoint) in queue.pending()


def test_without_hard_links_files_are_copied_and_a_full_disk_leaves_nothing_half_done(queue, tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError(errno.EXDEV, "Invalid link")

    checkpoint = write_checkpoint(tmp_path, 4)
    monkeypatch.setattr(os, "link", fail)
    queued = queue.add(checkpoint)
    assert not os.path.samefile(queued / "config.json", checkpoint / "config.json")
    assert (queued / "config.json").read_text() == "config.json of step 4"
    queue.remove(queued)
    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="Invalid link"):
        queue.add(checkpoint)
    assert queue.pending() == [] and content_of(queue.folder) == {}


@pytest.mark.parametrize("lacks", ["trainer_state.json", "config.json"])
def test_an_incomplete_checkpoint_or_one_that_vanishes_meanwhile_is_refused(queue, tmp_path, monkeypatch, lacks):
    checkpoint, link = write_checkpoint(tmp_path, 9), os.link
    (checkpoint / lacks).unlink()
    for path in (checkpoint, tmp_path / "checkpoint-10"):
        with pytest.raises(UserError, match=f"{path.name}: is gone or incomplete"):
            queue.add(path)

    def link_after_rotation(source, target):
        shutil.rmtree(source.parent, ignore_errors=True)
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_rotation)
    with pytest.raises(UserError, match="checkpoint-9: is gone or incomplete"):
        queue.add(write_checkpoint(tmp_path, 9))
    assert queue.pending() == []
