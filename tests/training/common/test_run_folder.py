from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from training.common.outputs import discard, publish
from training.common.run_folder import STAGING, checkpoints, last_checkpoint, remove_leftovers, rotate

NEEDED = ("config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


def _checkpoint(folder: Path, name: str, without: str = "") -> Path:
    checkpoint = folder / name
    checkpoint.mkdir(parents=True)
    for file in NEEDED:
        if file != without:
            (checkpoint / file).write_text(name)
    return checkpoint


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "missing") is None
    expected = [_checkpoint(tmp_path, f"checkpoint-{step}") for step in (2, 9, 10, 100)]
    assert checkpoints(tmp_path) == expected
    assert last_checkpoint(tmp_path) == expected[-1]


@pytest.mark.parametrize("lacking", NEEDED)
def test_a_checkpoint_that_lacks_a_file_is_not_resumed_from(tmp_path: Path, lacking: str) -> None:
    _checkpoint(tmp_path, "checkpoint-5", without=lacking)
    whole = _checkpoint(tmp_path, "checkpoint-4")
    assert last_checkpoint(tmp_path) == whole


@pytest.mark.parametrize(
    "name",
    [
        *(f"{STAGING}/checkpoint-9", ".checkpoint-9.discarded", "checkpoint-abc", "checkpoint-", "checkpoint-²"),
        *("my-checkpoint-9", "checkpoint-9-old"),
    ],
)
def test_folders_with_other_names_are_not_checkpoints(tmp_path: Path, name: str) -> None:
    _checkpoint(tmp_path, name)
    whole = _checkpoint(tmp_path, "checkpoint-4")
    assert checkpoints(tmp_path) == [whole]


def test_publishing_is_one_rename_of_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = _checkpoint(tmp_path, f"{STAGING}/checkpoint-3")
    (partial / "1_Pooling").mkdir()
    (partial / "1_Pooling/config.json").write_text("{}")
    seen = []

    def rename(path: Path, target: Path) -> None:
        seen.append((path, last_checkpoint(tmp_path)))
        path.replace(target)

    monkeypatch.setattr(Path, "rename", rename)
    publish(partial, tmp_path / "checkpoint-3")
    assert seen == [(partial, None)]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert _names(tmp_path / "checkpoint-3") == {*NEEDED, "1_Pooling"}


def test_publishing_replaces_an_incomplete_folder(tmp_path: Path) -> None:
    torn = _checkpoint(tmp_path, "checkpoint-3", without="scheduler.pt")
    (torn / "torn").write_text("")
    publish(_checkpoint(tmp_path, f"{STAGING}/checkpoint-3"), torn)
    assert last_checkpoint(tmp_path) == torn and not (torn / "torn").exists()


def test_a_failed_publication_leaves_the_partial_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    partial = _checkpoint(tmp_path, f"{STAGING}/checkpoint-3")
    with pytest.raises(OSError, match="No space"):
        publish(partial, tmp_path / "checkpoint-3")
    assert _names(tmp_path) == {STAGING}


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        *((limit, None, [1, 2, 3, 10]) for limit in (None, 0, 4)),
        *((2, None, [3, 10]), (1, None, [10]), (1, 10, [10])),
        *((1, 2, [2, 10]), (2, 2, [2, 10]), (3, 1, [1, 3, 10])),
    ],
)
def test_rotation_spares_the_newest_and_the_best(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 10):
        _checkpoint(tmp_path, f"checkpoint-{step}")
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{best}" if best else None)
    assert _names(tmp_path) == {f"checkpoint-{step}" for step in left}


def test_rotation_neither_counts_nor_touches_other_folders(tmp_path: Path) -> None:
    others = [
        _checkpoint(tmp_path, "checkpoint-1", without="scheduler.pt"),
        _checkpoint(tmp_path, "checkpoint-99", without="trainer_state.json"),
        _checkpoint(tmp_path, "checkpoint-best"),
    ]
    whole = [_checkpoint(tmp_path, f"checkpoint-{step}") for step in (2, 3)]
    rotate(tmp_path, 2)
    assert all(path.exists() for path in (*others, *whole))
    rotate(tmp_path, 1)
    assert _names(tmp_path) == {path.name for path in (*others, whole[-1])}


def test_a_deletion_interrupted_half_way_leaves_nothing_under_the_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _checkpoint(tmp_path, "checkpoint-3")
    rmtree, torn = shutil.rmtree, []

    def interrupted(path: Path, **kwargs: object) -> None:
        if Path(path).exists():
            torn.append(path)
            (Path(path) / "model.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        discard(checkpoint)
    assert torn and not checkpoint.exists() and last_checkpoint(tmp_path) is None
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    # The same step may be saved, and discarded, again.
    discard(_checkpoint(tmp_path, "checkpoint-3"))
    assert not _names(tmp_path)


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (f"{STAGING}/checkpoint-9", ".checkpoint-3.discarded", "checkpoint-6", "prepared/.source.partial"):
        _checkpoint(tmp_path, name)
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == {"checkpoint-6", "prepared"}
    assert (tmp_path / "prepared/.source.partial").exists()
    remove_leftovers(tmp_path / "missing")
