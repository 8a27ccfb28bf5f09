"""Checkpoints that are uploaded while a training runs: whatever the Hub does, the training ends in the same weights."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainerControl, TrainerState

from tests.hub_server.client import connected, environment
from tests.hub_server.server import TOKEN, HubServer
from tests.training.recipes import write_recipe, write_single_stage
from training import run_stage
from training.common.errors import StoppedError, UserError
from training.common.run_folder import last_checkpoint
from training.config.recipe import load_recipe
from training.publish import main as publish
from training.publishing.hub import background_upload, push_callback
from training.publishing.hub.background_upload import BackgroundUpload
from training.publishing.hub.retries import HubUnavailableError
from training.publishing.hub.upload_queue import QUEUE, UploadQueue
from training.run_stage import main

REPO = "org/tiny"
REVISIONS = {"run-step-000005", "run-step-000010"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_single_stage(tmp_path, save_steps=5, save_total_limit=1)


@pytest.fixture
def uploads(recipe: Path) -> Path:
    """The same recipe, with uploads."""
    recipe.write_text(recipe.read_text() + f"push_checkpoints: {REPO}\n")
    return recipe


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_callback, "_LOGIN_SECONDS", 5.0)


def revisions(hub: HubServer) -> set[str]:
    return {*hub.repository(REPO).branches} - {"main"}


def waiting(recipe: Path) -> list[str]:
    return [path.name for path in UploadQueue(recipe.parent / "run").waiting()]


@pytest.mark.usefixtures("client_waits")
def test_every_checkpoint_is_uploaded_though_all_but_one_are_deleted(uploads: Path, hub_server: HubServer) -> None:
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
    uploads: Path,
    hub_server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    check_same_weights: Callable[..., None],
    trouble: str,
) -> None:
    plain = write_single_stage(tmp_path / "plain", save_steps=5)
    assert main([str(plain)]) == 0
    monkeypatch.setattr(push_callback, "_LOGIN_SECONDS", 0.2)
    monkeypatch.setattr(push_callback, "_LAST_SECONDS", 0.5)
    what = {"refuses": {"cut_after": 0}, "hangs": {"delay": 5.0}, "fails": {"status": 503}}[trouble]
    hub_server.faults.add("", "/", times=None, **what)
    callback = push_callback.PushCheckpoints.__init__
    monkeypatch.setattr(
        push_callback.PushCheckpoints, "__init__", lambda self, *known: callback(self, *known, last_seconds=0.5)
    )
    with connected(hub_server, tmp_path / "home"), caplog.at_level(logging.WARNING):
        began = time.monotonic()
        assert main([str(uploads)]) == 0
        assert time.monotonic() - began < 60
    check_same_weights(tmp_path / "run", tmp_path / "plain" / "run")
    assert waiting(uploads) == ["checkpoint-5", "checkpoint-10"]
    last = caplog.messages[-1]
    assert "not uploaded yet: checkpoint-5, checkpoint-10" in last and f"--repo {REPO}" in last
    assert TOKEN not in caplog.text


@pytest.mark.usefixtures("client_waits")
@pytest.mark.parametrize("again", ["resume", "command"])
def test_what_waits_is_uploaded_later(uploads: Path, hub_server: HubServer, again: str) -> None:
    hub_server.faults.add("", "/", times=None, status=503)
    assert main([str(uploads)]) == 0
    assert waiting(uploads) == ["checkpoint-5", "checkpoint-10"]
    hub_server.faults.clear()
    run = uploads.parent / "run"
    if again == "resume":
        assert main([str(uploads), "--resume"]) == 0
    else:
        assert publish(["push-checkpoints", str(run), "--repo", REPO]) == 0
    assert revisions(hub_server) == REVISIONS and waiting(uploads) == []


@pytest.mark.usefixtures("client_waits")
def test_a_training_that_goes_on_uploads_what_its_first_part_could_not(
    recipe: Path, uploads: Path, hub_server: HubServer
) -> None:
    hub_server.faults.add("", "/", times=None, status=503)
    assert main([str(uploads), "--num_train_epochs", "1", "--warmup_steps", "2"]) == 0
    hub_server.faults.clear()
    run = uploads.parent / "run"
    # As if it had been stopped half way: the model is not there yet.
    for path in sorted((run / "model").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run / "model").rmdir()
    assert main([str(uploads), "--resume", "--accept-changes"]) == 0
    assert revisions(hub_server) == REVISIONS


@pytest.mark.usefixtures("client_waits")
def test_faults_that_pass_are_not_noticed(uploads: Path, hub_server: HubServer) -> None:
    for method, path, what in (
        ("POST", "/commit/run-step-000005", {"lose_answer": True}),
        ("PUT", "storage", {"cut_after": 10}),
        ("GET", "/tree/", {"status": 429, "retry_after": 1}),
    ):
        hub_server.faults.add(method, path, **what)
    assert main([str(uploads)]) == 0
    assert revisions(hub_server) == REVISIONS and waiting(uploads) == []
    assert len(hub_server.repository(REPO).branches) == 3


@pytest.mark.parametrize(("token", "message"), [(None, "not logged in"), ("hf_wrong", "token")])
def test_a_login_that_cannot_work_is_told_at_the_start(
    uploads: Path, hub_server: HubServer, tmp_path: Path, capsys, token: str | None, message: str
) -> None:
    with connected(hub_server, tmp_path / "home", token):
        assert main([str(uploads)]) == 2
    told = capsys.readouterr().err
    assert "key 'push_checkpoints'" in told and message in told and "hf_wrong" not in told
    assert not list((uploads.parent / "run").glob("checkpoint-*"))


@pytest.mark.usefixtures("client_waits")
def test_a_refusal_in_the_middle_ends_the_uploads_not_the_training(
    uploads: Path, hub_server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    hub_server.faults.add("POST", "/commit/", times=None, status=403)
    with caplog.at_level(logging.WARNING):
        assert main([str(uploads)]) == 0
    refusals = [message for message in caplog.messages if "no further checkpoints are uploaded in this run" in message]
    assert len(refusals) == 1
    assert waiting(uploads) == ["checkpoint-5", "checkpoint-10"] and revisions(hub_server) <= {
        "run-step-000005.partial"
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"push_checkpoints": "tiny"}, "key 'push_checkpoints': 'tiny': it is not ORG/NAME"),
        ({"push_checkpoints": REPO, "save_strategy": "no"}, "without checkpoints; give 'save_strategy'"),
        ({"push_checkpoints": REPO, "lora": True, "model": "x", "model_config": None}, "hold an adapter alone"),
    ],
)
def test_bad_keys_are_told_before_anything_runs(tmp_path: Path, capsys, keys: dict, message: str) -> None:
    recipe = write_single_stage(tmp_path)
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **keys}))
    assert main([str(recipe)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_option_may_stand_for_all_stages_of_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["pruned"] = {"model": "stage1", "prune_to": {"num_hidden_layers": 1}, "instructions": False}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    stages = load_recipe(recipe, {"push_checkpoints": REPO}).stages
    assert [stage.arguments.push_checkpoints for stage in stages] == [REPO] * 3


def test_a_full_queue_or_disk_is_told_and_costs_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = push_callback.PushCheckpoints(REPO, tmp_path)
    control = TrainerControl()
    queue = callback.queue

    def save(step: int) -> None:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("config.json", "trainer_state.json"):
            (folder / name).write_text("{}")
        callback.on_save(None, TrainerState(global_step=step), control)

    queue.limit = 1
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            save(step)
        assert [path.name for path in queue.waiting()] == ["checkpoint-1"]
        assert "checkpoint-2 is not uploaded: 1 checkpoints wait already" in caplog.text
        queue.limit = 8

        def full(checkpoint: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(queue, "add", full)
        save(3)
        assert "checkpoint-3 is not uploaded: [Errno 28]" in caplog.text


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def queue_of(tmp_path: Path, *steps: int) -> UploadQueue:
    queue = UploadQueue(tmp_path)
    for step in steps:
        (queue.folder / f"checkpoint-{step}").mkdir(parents=True)
    return queue


def test_a_hub_that_is_down_is_tried_again_by_itself(tmp_path: Path) -> None:
    tries = []

    def upload(checkpoint: Path) -> str:
        tries.append(checkpoint.name)
        if len(tries) < 4:
            raise HubUnavailableError("the Hub is unavailable")
        return "revision"

    uploading = BackgroundUpload(queue_of(tmp_path, 1, 2), tmp_path, REPO, waits=(0.01, 0.02), upload=upload)
    wait_until(lambda: len(tries) == 5)
    assert uploading.finish(20) == 2
    assert tries == ["checkpoint-1"] * 4 + ["checkpoint-2"]


def test_something_new_is_reason_enough_to_try(tmp_path: Path) -> None:
    tries = []

    def upload(checkpoint: Path) -> str:
        tries.append(checkpoint.name)
        if len(tries) == 1:
            raise HubUnavailableError("the Hub is unavailable")
        return "revision"

    uploading = BackgroundUpload(queue_of(tmp_path, 1), tmp_path, REPO, waits=(600, 600), upload=upload)
    wait_until(lambda: len(tries) == 1)
    queue_of(tmp_path, 2)
    uploading.look_again()
    wait_until(lambda: len(tries) == 3)
    assert uploading.finish(20) == 2


def test_what_another_process_uploaded_meanwhile_is_no_reason_to_stop(tmp_path: Path) -> None:
    queue, tries = queue_of(tmp_path, 1, 2), []

    def upload(checkpoint: Path) -> str:
        tries.append(checkpoint.name)
        if len(tries) == 1:
            queue.remove(checkpoint)
            raise UserError("config.json is missing")
        return "revision"

    assert BackgroundUpload(queue, tmp_path, REPO, upload=upload).finish(20) == 1
    assert tries == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.usefixtures("client_waits")
def test_the_finished_model_is_saved_before_uploads_are_waited_for(
    uploads: Path, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[bool] = []
    finish = BackgroundUpload.finish

    def looking(self: BackgroundUpload, seconds: float) -> int:
        saved.append((uploads.parent / "run/model/config.json").is_file())
        return finish(self, seconds)

    monkeypatch.setattr(BackgroundUpload, "finish", looking)
    assert main([str(uploads)]) == 0
    assert saved == [True]


@pytest.mark.usefixtures("client_waits")
def test_a_training_that_fails_says_what_waits(
    uploads: Path, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub_server.faults.add("", "/", times=None, status=503)
    monkeypatch.setattr(push_callback, "_INTERRUPTED_SECONDS", 0.1)

    def fail(*known: object) -> None:
        raise StoppedError("the disk is full")

    monkeypatch.setattr("training.stages.stage._save", fail)
    with caplog.at_level(logging.WARNING):
        assert main([str(uploads)]) == 1
    assert "not uploaded yet: checkpoint-5, checkpoint-10" in caplog.text


@pytest.mark.parametrize(("number", "longest"), [(signal.SIGTERM, 0.1), (None, 7.0)])
def test_a_training_that_a_signal_ended_hardly_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, longest: float
) -> None:
    monkeypatch.setattr(push_callback, "_INTERRUPTED_SECONDS", 0.1)
    waits: list[float] = []
    upload = SimpleNamespace(finish=lambda seconds: waits.append(seconds) or 0)
    callback = push_callback.PushCheckpoints(
        REPO, tmp_path, SimpleNamespace(signal=number), last_seconds=7.0, upload=lambda queue: upload
    )
    callback.begin()
    callback.end()
    callback.begin()
    callback.end(hurry=True)
    assert waits == [longest, 0.1]


def test_a_new_checkpoint_is_a_reason_to_look_even_if_it_could_not_be_queued(tmp_path: Path) -> None:
    looked: list[int] = []
    upload = SimpleNamespace(look_again=lambda: looked.append(1))
    callback = push_callback.PushCheckpoints(REPO, tmp_path, upload=lambda queue: upload)
    callback.begin()
    callback.on_save(None, TrainerState(global_step=5), TrainerControl())
    assert looked == [1]


@pytest.mark.slow
@pytest.mark.usefixtures("client_waits")
def test_a_training_that_is_killed_in_the_middle_of_an_upload_catches_up(
    uploads: Path, hub_server: HubServer, tmp_path: Path
) -> None:
    slow = hub_server.faults.add("PUT", "storage", times=None, delay=30)
    process = subprocess.Popen(
        [sys.executable, run_stage.__file__, str(uploads)],
        env=environment(hub_server, tmp_path / "home"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: bool(slow.met) and bool(last_checkpoint(tmp_path / "run")), 120)
    finally:
        process.kill()
        process.wait()
    assert revisions(hub_server) <= {"run-step-000005.partial"} and "checkpoint-5" in waiting(uploads)
    hub_server.faults.clear()
    assert main([str(uploads), "--resume"]) == 0
    assert revisions(hub_server) == REVISIONS and waiting(uploads) == []
    repository = hub_server.repository(REPO)
    assert all(name not in REVISIONS or commit == repository.branches[name] for name, commit in repository.moves)


@pytest.mark.usefixtures("client_waits")
def test_the_end_waits_for_no_longer_than_it_may(tmp_path: Path) -> None:
    uploading = background_upload.BackgroundUpload(
        queue_of(tmp_path, 1), tmp_path, REPO, upload=lambda checkpoint: time.sleep(3) or "revision"
    )
    began = time.monotonic()
    assert uploading.finish(0.2) == 0
    assert time.monotonic() - began < 2.5
