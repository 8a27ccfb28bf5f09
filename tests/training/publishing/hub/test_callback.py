"""Checkpoints that are uploaded while a training runs: Hub failures never change its weights."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainerControl, TrainerState

from tests.hub_server.client import connected
from tests.hub_server.server import TOKEN, HubServer
from tests.training.recipes import write_recipe, write_single_stage
from training import run_stage
from training.common.errors import StoppedError, UserError
from training.common.run_folder import last_checkpoint
from training.config.recipe import load_recipe
from training.publish import main as publish
from training.publishing.hub import callback
from training.publishing.hub.callback import PushCheckpoints
from training.publishing.hub.retries import HubUnavailableError
from training.publishing.hub.upload_queue import QUEUE, UploadQueue
from training.run_stage import main

pytestmark = pytest.mark.usefixtures("client_waits")

REPO = "org/tiny"
REVISIONS = {"run-step-000005", "run-step-000010"}


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """A recipe with uploads."""
    return write_single_stage(tmp_path, save_steps=5, save_total_limit=1, push_checkpoints=REPO)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback, "_LOGIN_SECONDS", 5.0)


def revisions(hub: HubServer) -> set[str]:
    return {*hub.repository(REPO).branches} - {"main"}


def pending(recipe: Path) -> list[str]:
    return [path.name for path in UploadQueue(recipe.parent / "run").pending()]


def test_every_checkpoint_is_uploaded_though_all_but_one_are_deleted(uploads, hub_server):
    assert main([str(uploads)]) == 0
    assert revisions(hub_server) == REVISIONS
    run = uploads.parent / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-10"] and not (run / QUEUE).exists()
    repository = hub_server.repository(REPO)
    assert repository.files("run-step-000010")["model.safetensors"] == (run / "model/model.safetensors").read_bytes()
    assert {*json.loads(repository.files("main")["checkpoints.json"])["revisions"]} == REVISIONS
    for name, commit in repository.moves:
        assert name not in REVISIONS or commit == repository.branches[name]


@pytest.mark.parametrize("trouble", ["refuses", "hangs", "fails"])
def test_a_hub_in_trouble_neither_stops_nor_changes_the_training(
    uploads, hub_server, tmp_path, monkeypatch, caplog, check_same_weights, trouble
):
    plain = write_single_stage(tmp_path / "plain", save_steps=5)
    assert main([str(plain)]) == 0
    monkeypatch.setattr(callback, "_LOGIN_SECONDS", 0.2)
    monkeypatch.setattr(callback, "_LAST_SECONDS", 0.5)
    what = {"refuses": {"cut_after": 0}, "hangs": {"delay": 5.0}, "fails": {"status": 503}}[trouble]
    hub_server.faults.add("", "/", times=None, **what)
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        assert main([str(uploads)]) == 0
        assert time.monotonic() - began < 60
    check_same_weights(tmp_path / "run", tmp_path / "plain" / "run")
    assert pending(uploads) == ["checkpoint-5", "checkpoint-10"]
    last = caplog.messages[-1]
    assert "not uploaded yet: checkpoint-5, checkpoint-10" in last and f"--repo {REPO}" in last
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("again", ["resume", "command"])
def test_pending_checkpoints_are_uploaded_later(uploads, hub_server, again):
    hub_server.faults.add("", "/", times=None, status=503)
    assert main([str(uploads)]) == 0
    assert pending(uploads) == ["checkpoint-5", "checkpoint-10"]
    hub_server.faults.clear()
    if again == "resume":
        assert main([str(uploads), "--resume"]) == 0
    else:
        assert publish(["push-checkpoints", str(uploads.parent / "run"), "--repo", REPO]) == 0
    assert revisions(hub_server) == REVISIONS and pending(uploads) == []


def test_a_training_that_goes_on_uploads_what_its_first_part_could_not(uploads, hub_server):
    hub_server.faults.add("", "/", times=None, status=503)
    assert main([str(uploads), "--num_train_epochs", "1", "--warmup_steps", "2"]) == 0
    hub_server.faults.clear()
    # As if it had been stopped half way.
    shutil.rmtree(uploads.parent / "run/model")
    assert main([str(uploads), "--resume", "--accept-changes"]) == 0
    assert revisions(hub_server) == REVISIONS


@pytest.mark.parametrize(("token", "message"), [(None, "not logged in"), ("hf_wrong", "token")])
def test_a_login_that_cannot_work_is_told_at_the_start(uploads, hub_server, tmp_path, capsys, token, message):
    with connected(hub_server, tmp_path / "home", token):
        assert main([str(uploads)]) == 2
    shown = capsys.readouterr().err
    assert "key 'push_checkpoints'" in shown and message in shown and "hf_wrong" not in shown
    assert not list((uploads.parent / "run").glob("checkpoint-*"))


def test_a_refusal_in_the_middle_ends_the_uploads_not_the_training(uploads, hub_server, caplog):
    hub_server.faults.add("POST", "/commit/", times=None, status=403)
    with caplog.at_level(logging.WARNING):
        assert main([str(uploads)]) == 0
    refusals = [message for message in caplog.messages if "no further checkpoints are uploaded in this run" in message]
    assert len(refusals) == 1
    assert pending(uploads) == ["checkpoint-5", "checkpoint-10"] and revisions(hub_server) <= {
        "run-step-000005.partial"
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"push_checkpoints": "tiny"}, "key 'push_checkpoints': 'tiny': it is not ORG/NAME"),
        ({"push_checkpoints": REPO, "save_strategy": "no"}, "without checkpoints; give 'save_strategy'"),
        (
            {"push_checkpoints": REPO, "lora": True, "model": "x", "model_config": None, "tokenizer": None},
            "hold an adapter alone",
        ),
    ],
)
def test_bad_keys_are_told_before_anything_runs(tmp_path, capsys, keys, message):
    recipe = write_single_stage(tmp_path)
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **keys}))
    assert main([str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_option_may_stand_for_all_stages_of_a_recipe(tmp_path):
    recipe = write_recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["pruned"] = {"model": "stage1", "prune_to": {"num_hidden_layers": 1}, "instructions": False}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    stages = load_recipe(recipe, {"push_checkpoints": REPO}).stages
    assert [stage.arguments.push_checkpoints for stage in stages] == [REPO] * 3


def test_a_full_queue_or_disk_is_logged_and_costs_nothing_else(tmp_path, caplog, monkeypatch):
    pushing = PushCheckpoints(REPO, tmp_path)

    def save(step: int) -> None:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("config.json", "trainer_state.json"):
            (folder / name).write_text("{}")
        pushing.on_save(None, TrainerState(global_step=step), TrainerControl())

    pushing.queue.limit = 1
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            save(step)
        assert [path.name for path in pushing.queue.pending()] == ["checkpoint-1"]
        assert "checkpoint-2 is not uploaded: 1 checkpoints are in the queue already" in caplog.text

        def full(checkpoint: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pushing.queue, "add", full)
        save(3)
        assert "checkpoint-3 is not uploaded: [Errno 28]" in caplog.text


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def queue(run: Path, *steps: int) -> None:
    for step in steps:
        (run / QUEUE / f"checkpoint-{step}").mkdir(parents=True)


class FakeUpload:
    """An upload whose first tries fail; ``tries`` are the checkpoints in the order of the calls."""

    def __init__(self, failures: int, fail: Callable[[Path], None]) -> None:
        self.tries: list[str] = []
        self.failures, self.fail = failures, fail

    def __call__(self, checkpoint: Path) -> str:
        self.tries.append(checkpoint.name)
        if len(self.tries) <= self.failures:
            self.fail(checkpoint)
        return "revision"


def is_down(checkpoint: Path) -> None:
    raise HubUnavailableError("the Hub is unavailable")


def test_a_hub_that_is_down_is_tried_again(tmp_path, monkeypatch):
    upload = FakeUpload(3, is_down)
    queue(tmp_path, 1, 2)
    monkeypatch.setattr(callback, "_WAITS", (0.01, 0.02))
    pushing = PushCheckpoints(REPO, tmp_path, upload=upload)
    pushing.begin()
    wait_until(lambda: len(upload.tries) == 5)
    pushing.end()
    assert upload.tries == ["checkpoint-1"] * 4 + ["checkpoint-2"] and pushing.pushed == 2


def test_a_new_checkpoint_is_a_reason_to_try_even_if_it_could_not_be_queued(tmp_path):
    upload = FakeUpload(1, is_down)
    queue(tmp_path, 1)
    pushing = PushCheckpoints(REPO, tmp_path, upload=upload)
    pushing.begin()
    wait_until(lambda: len(upload.tries) == 1)
    pushing.on_save(None, TrainerState(global_step=2), TrainerControl())
    wait_until(lambda: len(upload.tries) == 2)
    pushing.end()
    assert pushing.pushed == 1


def test_a_checkpoint_that_another_process_uploaded_is_no_reason_to_stop(tmp_path):
    def uploaded(checkpoint: Path) -> None:
        UploadQueue(tmp_path).remove(checkpoint)
        raise UserError("config.json is missing")

    upload = FakeUpload(1, uploaded)
    queue(tmp_path, 1, 2)
    pushing = PushCheckpoints(REPO, tmp_path, upload=upload)
    pushing.begin()
    pushing.end()
    assert upload.tries == ["checkpoint-1", "checkpoint-2"] and pushing.pushed == 1


def test_the_finished_model_is_saved_before_uploads_are_waited_for(uploads, hub_server, monkeypatch):
    saved: list[bool] = []
    end = PushCheckpoints.end

    def looking(self: PushCheckpoints) -> None:
        saved.append((uploads.parent / "run/model/config.json").is_file())
        end(self)

    monkeypatch.setattr(PushCheckpoints, "end", looking)
    assert main([str(uploads)]) == 0
    assert saved == [True]


def test_a_training_that_fails_logs_what_is_pending(uploads, hub_server, monkeypatch, caplog):
    hub_server.faults.add("", "/", times=None, status=503)
    monkeypatch.setattr(callback, "_INTERRUPTED_SECONDS", 0.1)

    def fail(*known: object) -> None:
        raise StoppedError("the disk is full")

    monkeypatch.setattr("training.stages.stage._save", fail)
    with caplog.at_level(logging.WARNING):
        assert main([str(uploads)]) == 1
    assert "not uploaded yet: checkpoint-5, checkpoint-10" in caplog.text


@pytest.mark.parametrize(
    ("number", "hurry", "last_seconds"),
    [(signal.SIGTERM, False, 7.0), (None, True, 7.0), (None, False, 0.2)],
)
def test_the_end_waits_no_longer_than_allowed_and_hardly_after_a_signal(
    tmp_path, monkeypatch, number, hurry, last_seconds
):
    monkeypatch.setattr(callback, "_INTERRUPTED_SECONDS", 0.1)
    monkeypatch.setattr(callback, "_LAST_SECONDS", last_seconds)
    queue(tmp_path, 1)
    upload = FakeUpload(1, lambda checkpoint: time.sleep(3))
    ended_by = SimpleNamespace(signal=number)
    pushing = PushCheckpoints(REPO, tmp_path, ended_by, upload)
    pushing.begin()
    began = time.monotonic()
    pushing.end(hurry)
    assert time.monotonic() - began < 2.5 and pushing.pushed == 0


@pytest.mark.slow
def test_a_training_that_is_killed_in_the_middle_of_an_upload_catches_up(uploads, hub_server, tmp_path, kill_when_met):
    slow = hub_server.faults.add("PUT", "storage", times=None, delay=30)
    kill_when_met(slow, run_stage.__file__, str(uploads), ready=lambda: bool(last_checkpoint(tmp_path / "run")))
    assert revisions(hub_server) <= {"run-step-000005.partial"} and "checkpoint-5" in pending(uploads)
    hub_server.faults.clear()
    assert main([str(uploads), "--resume"]) == 0
    assert revisions(hub_server) == REVISIONS and pending(uploads) == []
    repository = hub_server.repository(REPO)
    assert all(name not in REVISIONS or commit == repository.branches[name] for name, commit in repository.moves)
