"""The queue of checkpoints: whole or absent, and there when the run has deleted its own."""

from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from training.common.errors import UserError
from training.publishing.hub import checkpoints
from training.publishing.hub.checkpoints import PushQueue

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


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_kept_without_its_optimizer_and_outlives_its_run(queue, tmp_path):
    checkpoint = write_checkpoint(tmp_path, 7)
    queued = queue.add(checkpoint)
    assert names(queued) == {*MODEL, "trainer_state.json"}
    assert os.path.samefile(queued / "model.safetensors", checkpoint / "model.safetensors")
    shutil.rmtree(checkpoint)
    assert (queued / "model.safetensors").read_text() == "model.safetensors of step 7"
    queue.remove(queued)
    assert queue.pending() == [] and not queue.folder.exists()


def test_the_oldest_comes_first_and_a_full_queue_stays_as_it_is(queue, tmp_path):
    for step in (100, 20, 3):
        assert queue.add(write_checkpoint(tmp_path, step)) == queue.add(tmp_path / f"checkpoint-{step}")
    (queue.folder / ".checkpoint-5.partial").mkdir()
    pending = ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert [path.name for path in queue.pending()] == pending
    with pytest.raises(UserError, match="3 checkpoints are in the queue already"):
        queue.add(write_checkpoint(tmp_path, 200))
    assert [path.name for path in queue.pending()] == pending


def test_a_checkpoint_that_another_process_removed_is_no_error_and_leftovers_go(queue, tmp_path):
    queued, kept = (queue.add(write_checkpoint(tmp_path, step)) for step in (7, 8))
    PushQueue(tmp_path).remove(queued)
    queue.remove(queued)
    for left in (".checkpoint-5.partial", ".checkpoint-6.discarded"):
        (queue.folder / left).mkdir()
        (queue.folder / left / "model.safetensors").write_text("weights")
    queue.tidy()
    assert [path.name for path in queue.folder.iterdir()] == [kept.name]


def test_the_disk_keeps_room_for_the_next_checkpoint(queue, tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, 7)
    sizes = {name: (checkpoint / name).stat().st_size for name in (*MODEL, *STATE)}
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
    assert queue.pending() == [] and names(queue.folder) == set()


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
