"""Checkpoints that are uploaded while a training runs: Hub failures never change its weights."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from tests.hub_server.client import connected
from tests.hub_server.server import TOKEN
from tests.training.recipes import write_single_stage
from training import run_stage
from training.common.errors import StoppedError, UserError
from training.common.run_folder import last_checkpoint
from training.publishing.hub import callback, checkpoints
from training.publishing.hub.callback import PushCheckpoints
from training.publishing.hub.checkpoints import QUEUE, PushQueue
from training.publishing.hub.hub import HubUnavailableError
from training.run_stage import main

pytestmark = pytest.mark.usefixtures("client_waits")

REPO = "org/tiny"
REVISIONS = {"run-step-000005", "run-step-000010"}


@pytest.fixture
def uploads(tmp_path):
    """A recipe with uploads."""
    return write_single_stage(tmp_path, save_steps=5, save_total_limit=1, push_checkpoints=REPO)


def revisions(hub):
    return {*hub.repository(REPO).branches} - {"main"}


def pending(recipe):
    return [path.name for path in PushQueue(recipe.parent / "run").pending()]


def test_every_checkpoint_is_uploaded_though_all_but_one_are_deleted(uploads, hub_server, monkeypatch):
    run, end = uploads.parent / "run", PushCheckpoints.end

    def end_of_a_saved_run(self):
        assert (run / "model/config.json").is_file(), "uploads are waited for when the finished model is saved"
        end(self)

    monkeypatch.setattr(PushCheckpoints, "end", end_of_a_saved_run)
    assert main([str(uploads)]) == 0
    assert revisions(hub_server) == REVISIONS
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-10"] and not (run / QUEUE).exists()
    repository = hub_server.repository(REPO)
    assert repository.files("run-step-000010")["model.safetensors"] == (run / "model/model.safetensors").read_bytes()
    assert {*json.loads(repository.files("main")["checkpoints.json"])["revisions"]} == REVISIONS
    assert all(name not in REVISIONS or commit == repository.branches[name] for name, commit in repository.moves)


@pytest.mark.parametrize("trouble", ["refuses", "hangs", "fails", "forbids"])
def test_a_hub_in_trouble_neither_stops_nor_changes_the_training(
    uploads, hub_server, tmp_path, monkeypatch, caplog, check_same_weights, trouble
):
    plain = write_single_stage(tmp_path / "plain", save_steps=5)
    assert main([str(plain)]) == 0
    monkeypatch.setattr(callback, "_LOGIN_SECONDS", 0.2)
    monkeypatch.setattr(callback, "_LAST_SECONDS", 0.5)
    what = {"refuses": {"cut_after": 0}, "hangs": {"delay": 5.0}, "fails": {"status": 503}, "forbids": {"status": 403}}
    hub_server.faults.add("", "/commit/" if trouble == "forbids" else "/", times=None, **what[trouble])
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert main([str(uploads)]) == 0
    assert time.monotonic() - began < 60
    check_same_weights(tmp_path / "run", tmp_path / "plain" / "run")
    assert pending(uploads) == ["checkpoint-5", "checkpoint-10"]
    assert "not uploaded yet: checkpoint-5, checkpoint-10; run: " in caplog.messages[-1] and TOKEN not in caplog.text
    assert caplog.text.count("no further checkpoints are uploaded in this run") == (trouble == "forbids")


@pytest.mark.parametrize("again", ["resume", "goes on"])
def test_pending_checkpoints_are_uploaded_later(uploads, hub_server, again):
    hub_server.faults.add("", "/", times=None, status=503)
    half = ["--num_train_epochs", "1", "--warmup_steps", "2"] if again == "goes on" else []
    assert main([str(uploads), *half]) == 0
    assert pending(uploads) == ["checkpoint-5", "checkpoint-10"][: 1 if half else 2]
    hub_server.faults.clear()
    if half:
        # As if it had been stopped half way.
        shutil.rmtree(uploads.parent / "run/model")
    assert main([str(uploads), "--resume", *(["--accept-changes"] if half else [])]) == 0
    assert revisions(hub_server) == REVISIONS and pending(uploads) == []


@pytest.mark.parametrize(("token", "message"), [(None, "not logged in"), ("hf_wrong", "token")])
def test_a_login_that_cannot_work_is_refused_at_the_start(uploads, hub_server, tmp_path, capsys, token, message):
    with connected(hub_server, tmp_path / "home", token):
        assert main([str(uploads)]) == 2
    shown = capsys.readouterr().err
    assert "key 'push_checkpoints'" in shown and message in shown and "hf_wrong" not in shown
    assert not list((uploads.parent / "run").glob("checkpoint-*"))


def test_a_full_queue_or_disk_is_logged_and_costs_nothing_else(tmp_path, caplog, monkeypatch):
    def add(checkpoint):
        raise OSError(28, "No space left on device")

    pushing = PushCheckpoints(REPO, tmp_path)
    monkeypatch.setattr(checkpoints, "QUEUE_LIMIT", 0)
    for reason in ("0 checkpoints are in the queue already", "[Errno 28]"):
        with caplog.at_level(logging.WARNING):
            pushing.on_save(None, TrainerState(global_step=3), TrainerControl())
        assert f"checkpoint-3 is not uploaded: {reason}" in caplog.text
        monkeypatch.setattr(pushing.queue, "add", add)


def wait_until(holds):
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def pushing(tmp_path, monkeypatch):
    """``pushing(failures, fail)``: checkpoints 1 and 2 are in the queue, the first uploads fail; with their names."""

    def make(failures, fail, ended_by=None):
        names = []

        def upload(checkpoint):
            names.append(checkpoint.name)
            if len(names) <= failures:
                fail(checkpoint)
            return "revision"

        for step in (1, 2):
            (tmp_path / QUEUE / f"checkpoint-{step}").mkdir(parents=True)
        monkeypatch.setattr(callback, "CheckpointUpload", lambda *known: SimpleNamespace(upload=upload))
        pushing = PushCheckpoints(REPO, tmp_path, ended_by)
        pushing.begin()
        return pushing, names

    return make


def is_down(checkpoint):
    raise HubUnavailableError("the Hub is unavailable")


def test_a_hub_that_is_down_is_tried_again(pushing, monkeypatch):
    monkeypatch.setattr(callback, "_WAITS", (0.01, 0.02))
    callback_, tried = pushing(3, is_down)
    wait_until(lambda: len(tried) == 5)
    callback_.end()
    assert tried == ["checkpoint-1"] * 4 + ["checkpoint-2"] and callback_.pushed == 2


def test_a_new_checkpoint_is_a_reason_to_try_even_if_it_could_not_be_queued(pushing):
    callback_, tried = pushing(1, is_down)
    wait_until(lambda: len(tried) == 1)
    callback_.on_save(None, TrainerState(global_step=3), TrainerControl())
    wait_until(lambda: len(tried) == 3)
    callback_.end()
    assert callback_.pushed == 2


def test_a_checkpoint_that_another_process_uploaded_is_no_reason_to_stop(pushing, tmp_path):
    def uploaded(checkpoint):
        PushQueue(tmp_path).remove(checkpoint)
        raise UserError("config.json is missing")

    callback_, tried = pushing(1, uploaded)
    callback_.end()
    assert tried == ["checkpoint-1", "checkpoint-2"] and callback_.pushed == 1


@pytest.mark.parametrize(
    ("number", "hurry", "last_seconds"),
    [(signal.SIGTERM, False, 7.0), (None, True, 7.0), (None, False, 0.2)],
)
def test_the_end_waits_no_longer_than_allowed_and_hardly_after_a_signal(
    pushing, monkeypatch, number, hurry, last_seconds
):
    monkeypatch.setattr(callback, "_INTERRUPTED_SECONDS", 0.1)
    monkeypatch.setattr(callback, "_LAST_SECONDS", last_seconds)
    callback_, _ = pushing(1, lambda checkpoint: time.sleep(3), SimpleNamespace(signal=number))
    began = time.monotonic()
    callback_.end(hurry)
    assert time.monotonic() - began < 2.5 and callback_.pushed == 0


def test_a_training_that_fails_logs_what_is_pending(uploads, hub_server, monkeypatch, caplog):
    hub_server.faults.add("", "/", times=None, status=503)
    monkeypatch.setattr(callback, "_INTERRUPTED_SECONDS", 0.1)

    def fail(*known):
        raise StoppedError("the disk is full")

    monkeypatch.setattr("training.stages.stage._save", fail)
    with caplog.at_level(logging.WARNING):
        assert main([str(uploads)]) == 1
    assert "not uploaded yet: checkpoint-5, checkpoint-10" in caplog.text


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
