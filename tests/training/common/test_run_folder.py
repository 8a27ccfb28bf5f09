"""Checkpoints of a run: which can be resumed from, their rotation, and what interrupted saves leave."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from training.common.outputs import discard, move_into_place
from training.common.run_folder import STAGING, checkpoints, last_checkpoint, remove_leftovers, rotate

NEEDED = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


def _checkpoint(folder, name, without=""):
    checkpoint = folder / name
    checkpoint.mkdir(parents=True)
    for file in NEEDED:
        if file != without:
            (checkpoint / file).write_text(name)
    return checkpoint


def _names(folder):
    return {path.name for path in folder.iterdir()}


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "missing") is None
    expected = [_checkpoint(tmp_path, f"checkpoint-{step}") for step in (2, 9, 10, 100)]
    for name in (f"{STAGING}/checkpoint-200", ".checkpoint-201.discarded", "checkpoint-abc", "checkpoint-202-old"):
        _checkpoint(tmp_path, name)
    assert checkpoints(tmp_path) == expected
    assert last_checkpoint(tmp_path) == expected[-1]


@pytest.mark.parametrize("lacking", NEEDED)
def test_a_checkpoint_that_lacks_a_file_is_not_resumed_from(tmp_path, lacking):
    _checkpoint(tmp_path, "checkpoint-5", without=lacking)
    whole = _checkpoint(tmp_path, "checkpoint-4")
    assert last_checkpoint(tmp_path) == whole


def test_publishing_is_one_rename_of_a_whole_folder(tmp_path, monkeypatch):
    torn = _checkpoint(tmp_path, "checkpoint-3", without="scheduler.pt")
    (torn / "torn").touch()
    partial = _checkpoint(tmp_path, f"{STAGING}/checkpoint-3")
    (partial / "1_Pooling").mkdir()
    rename, seen = Path.rename, []

    def note_and_rename(path, target):
        seen.append((path, target, last_checkpoint(tmp_path)))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", note_and_rename)
    move_into_place(partial, torn)
    # The incomplete folder of that name goes away first.
    assert [path for path, *_ in seen] == [torn, partial] and seen[-1][1:] == (torn, None)
    assert last_checkpoint(tmp_path) == torn
    assert _names(torn) == {*NEEDED, "1_Pooling"}


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        *((None, None, [1, 2, 3, 10]), (4, None, [1, 2, 3, 10]), (2, None, [3, 10]), (1, 10, [10])),
        *((1, 2, [2, 10]), (2, 2, [2, 10]), (3, 1, [1, 3, 10])),
    ],
)
def test_rotation_spares_the_newest_the_best_and_other_folders(tmp_path, limit, best, left):
    for step in (1, 2, 3, 10):
        _checkpoint(tmp_path, f"checkpoint-{step}")
    others = {"checkpoint-0", "checkpoint-99", "checkpoint-best"}
    for name in others:
        _checkpoint(tmp_path, name, without="scheduler.pt")
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{best}" if best else None)
    assert _names(tmp_path) == {*others, *(f"checkpoint-{step}" for step in left)}


def test_a_deletion_interrupted_half_way_leaves_nothing_under_the_old_name(tmp_path, monkeypatch):
    checkpoint = _checkpoint(tmp_path, "checkpoint-3")

    def interrupted(path, **kwargs):
        if path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        discard(checkpoint)
    assert not checkpoint.exists() and last_checkpoint(tmp_path) is None
    monkeypatch.undo()
    # The same step may be saved, and discarded, again.
    discard(_checkpoint(tmp_path, "checkpoint-3"))
    assert not _names(tmp_path)


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in (f"{STAGING}/checkpoint-9", ".checkpoint-3.discarded", "checkpoint-6", "prepared/.source.partial"):
        _checkpoint(tmp_path, name)
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == {"checkpoint-6", "prepared"}
    assert (tmp_path / "prepared/.source.partial").exists()
