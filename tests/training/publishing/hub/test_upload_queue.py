"""The queue of checkpoints: whole or absent, and there when the run has deleted its own."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.common.errors import UserError
from training.publishing.hub.upload_queue import QueueFullError, UploadQueue

MODEL = {"config.json", "model.safetensors", "modules.json", "tokenizer.json", "1_Pooling/config.json"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    for name in (*MODEL, *STATE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_waits_without_its_optimizer_and_outlives_its_run(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path)
    checkpoint = write_checkpoint(tmp_path, 7)
    place = queue.add(checkpoint)
    assert names(place) == {*MODEL, "trainer_state.json"}
    assert os.path.samefile(place / "model.safetensors", checkpoint / "model.safetensors")
    shutil.rmtree(checkpoint)
    assert (place / "model.safetensors").read_text() == "model.safetensors of step 7"
    queue.remove(place)
    assert queue.waiting() == [] and not queue.folder.exists()


def test_the_oldest_comes_first_and_what_is_half_linked_is_not_there(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path)
    for step in (100, 20, 3):
        queue.add(write_checkpoint(tmp_path, step))
    (queue.folder / ".checkpoint-5.partial").mkdir()
    assert [path.name for path in queue.waiting()] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    queue.remove(queue.waiting()[0])
    assert len(UploadQueue(tmp_path).waiting()) == 2


def test_what_another_process_took_out_is_no_error_and_leftovers_go(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path)
    place = queue.add(write_checkpoint(tmp_path, 7))
    kept = queue.add(write_checkpoint(tmp_path, 8))
    UploadQueue(tmp_path).remove(place)
    queue.remove(place)
    for left in (".checkpoint-5.partial", ".checkpoint-6.discarded"):
        (queue.folder / left).mkdir()
        (queue.folder / left / "model.safetensors").write_text("weights")
    queue.tidy()
    assert [path.name for path in queue.folder.iterdir()] == [kept.name]


def test_a_queue_that_is_emptied_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, mkdir, emptied = UploadQueue(tmp_path), Path.mkdir, []

    def mkdir_after_removal(path: Path, *words: object, **options: object) -> None:
        if path.name.endswith(".partial") and not emptied:
            emptied.append(path)
            queue.folder.rmdir()
        mkdir(path, *words, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir_after_removal)
    assert queue.add(write_checkpoint(tmp_path, 7)) in queue.waiting()
    assert emptied


@pytest.mark.parametrize("short", [0, 1])
def test_the_disk_keeps_room_for_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: int
) -> None:
    queue, checkpoint = UploadQueue(tmp_path), write_checkpoint(tmp_path, 7)
    sizes = {name: (checkpoint / name).stat().st_size for name in (*MODEL, *STATE)}
    needed = sum(sizes.values()) + sum(sizes[name] for name in (*MODEL, "trainer_state.json"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - short))
    if short:
        with pytest.raises(QueueFullError, match="must be free"):
            queue.add(checkpoint)
        assert queue.waiting() == [] and not queue.folder.exists()
    # Who empties the queue by hand saves no checkpoints.
    assert queue.add(checkpoint, limited=not short) in queue.waiting()


def test_added_twice_it_waits_once(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path, limit=1)
    checkpoint = write_checkpoint(tmp_path, 1)
    assert queue.add(checkpoint) == queue.add(checkpoint)
    assert len(queue.waiting()) == 1


def test_a_full_queue_keeps_what_waits(tmp_path: Path) -> None:
    queue = UploadQueue(tmp_path, limit=2)
    first = [queue.add(write_checkpoint(tmp_path, step)) for step in (1, 2)]
    with pytest.raises(QueueFullError, match="2 checkpoints wait already"):
        queue.add(write_checkpoint(tmp_path, 3))
    assert queue.waiting() == first
    assert queue.add(tmp_path / "checkpoint-3", limited=False) in queue.waiting()


def test_where_there_are_no_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, place: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    checkpoint = write_checkpoint(tmp_path, 4)
    place = UploadQueue(tmp_path).add(checkpoint)
    assert not os.path.samefile(place / "config.json", checkpoint / "config.json")
    assert (place / "config.json").read_text() == "config.json of step 4"


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = write_checkpoint(tmp_path, 4)
    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    queue = UploadQueue(tmp_path)
    with pytest.raises(OSError, match="No space"):
        queue.add(checkpoint)
    assert queue.waiting() == [] and names(queue.folder) == set()


@pytest.mark.parametrize("gone", ["model.safetensors", "trainer_state.json"])
def test_a_checkpoint_that_vanishes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    checkpoint, link = write_checkpoint(tmp_path, 9), os.link

    def link_after_rotation(source: Path, place: Path) -> None:
        if source.name == gone:
            shutil.rmtree(checkpoint)
        link(source, place)

    monkeypatch.setattr(os, "link", link_after_rotation)
    queue = UploadQueue(tmp_path)
    with pytest.raises(UserError, match="checkpoint-9: is gone, or not whole"):
        queue.add(checkpoint)
    assert queue.waiting() == []


@pytest.mark.parametrize("lacks", ["trainer_state.json", "config.json"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, lacks: str) -> None:
    checkpoint = write_checkpoint(tmp_path, 9)
    (checkpoint / lacks).unlink()
    with pytest.raises(UserError, match="not whole"):
        UploadQueue(tmp_path).add(checkpoint)
    with pytest.raises(UserError, match="is gone"):
        UploadQueue(tmp_path).add(tmp_path / "checkpoint-10")
