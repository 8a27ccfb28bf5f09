"""Outputs are written by one command at a time, are complete or absent, never replace an input, and are checked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import time

import pytest

from training.common import outputs
from training.common.errors import UserError
from training.common.outputs import (
    check_file,
    check_output,
    checksums_of,
    clear_partials,
    locked,
    move_into_place,
    new_folder,
    write_checksums,
    write_whole,
)

FORK = multiprocessing.get_context("fork")


def _hold(output, entered):
    with locked(output):
        entered.put(None)
        time.sleep(60)


def _enter(output, times, together):
    for _ in range(times):
        with locked(output):
            try:
                output.touch(exist_ok=False)
                output.unlink()
            except FileExistsError:
                together.value += 1


def test_commands_that_write_the_same_wait_for_one_another(tmp_path):
    together = FORK.Value("i", 0)
    processes = [FORK.Process(target=_enter, args=(tmp_path / "new/file", 100, together)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and together.value == 0
    assert not list((tmp_path / "new").iterdir())


def test_a_killed_command_keeps_nobody_waiting(tmp_path):
    entered = FORK.Queue()
    killed = FORK.Process(target=_hold, args=(tmp_path / "file", entered))
    killed.start()
    entered.get(timeout=30)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(30)
    with locked(tmp_path / "file", busy="is written"):
        pass


def test_an_output_that_cannot_be_written_or_is_being_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "output"):
        pass
    # Spelled in another way, it is the same.
    other = tmp_path / "folder" / ".." / "output"
    with locked(tmp_path / "output"), pytest.raises(UserError, match="output: is in use"), locked(other, "is in use"):
        pass
    with locked(other, "is in use"):
        pass


def test_a_folder_is_whole_or_absent(tmp_path):
    output = tmp_path / "output"
    (tmp_path / ".output.partial/left by a kill").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), new_folder(output) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(output) as folder:
        (folder / "file").touch()
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["file"]


def test_what_a_link_leads_to_is_written(tmp_path):
    place, link = tmp_path / "disk" / "place", tmp_path / "link"
    place.mkdir(parents=True)
    link.symlink_to(place)
    for text in ("one", "two"):
        with new_folder(link) as folder:
            (folder / "file").write_text(text)
        assert link.is_symlink() and (place / "file").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "file", "link", "place"]


def test_finished_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "partial").mkdir()
        # As safetensors leaves them.
        (tmp_path / "partial/model.safetensors").touch(mode=0o600)
        move_into_place(tmp_path / "partial", tmp_path / "final")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "final/model.safetensors").stat().st_mode) == 0o640


def test_what_killed_commands_left_is_cleared_but_not_what_is_written(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    for name in (".a.partial/file", ".b.partial", ".c.partial", "d.partial", ".e"):
        (tmp_path / name).touch()
    with locked(tmp_path / "c"):
        clear_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.partial", ".e", "d.partial"]


def test_an_output_is_not_written_over_what_is_read(tmp_path):
    source, link = tmp_path / "data" / "a.parquet", tmp_path / "link"
    source.parent.mkdir()
    source.touch()
    link.symlink_to(source.parent)
    for output in (source, source.parent, tmp_path, link):
        with pytest.raises(UserError, match="is read; give another --to"):
            check_output(output, [source], option="--to")
    # Beside it, or below its folder, nothing is lost.
    check_output(source.parent / "mined", [source])
    # A folder that is read as a whole would be another one.
    with pytest.raises(UserError, match=r"lies in .*data, which is read"):
        check_output(source.parent / "mined", [source.parent])
    # A name on the Hub is not a folder.
    check_output(tmp_path / "org", [tmp_path / "org" / "name"])


def test_foreign_files_in_an_output_are_refused(tmp_path):
    check_output(tmp_path / "new", ours=[])
    (tmp_path / "report.json").touch()
    check_output(tmp_path, ours=["*.json"])
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        check_output(tmp_path, ours=["report.json"])
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "thesis.tex", ours=[])
    check_output(tmp_path)


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    write_whole(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"

    def no_room(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "größer"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A file of a thousand blocks with its checksums."""
    monkeypatch.setattr(outputs, "_BLOCK_BYTES", 100)
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    write_checksums(path)
    return path


def test_changed_bytes_and_missing_files_are_noticed(written, refuses, monkeypatch):
    # All blocks are read.
    monkeypatch.setattr(outputs, "_BLOCK_BYTES", 2000)
    write_checksums(written)
    check_file(written, "mend it")
    content = written.read_bytes()
    flipped = [content[:at] + b"x" + content[at + 1 :] for at in (0, 1999, 2000, 30_000, len(content) - 1)]
    for changed in (*flipped, content[:-1], content + b"x", b""):
        written.write_bytes(changed)
        with refuses(written, "is damaged", "mend it"):
            check_file(written, "mend it")
    for path in (checksums_of(written), written):
        path.unlink()
        with refuses(written, "cannot be checked", "mend it"):
            check_file(written, "mend it")
    written.touch()
    write_checksums(written)
    check_file(written, "mend it")


def test_a_large_file_is_read_in_part_each_time_another(written, refuses, monkeypatch):
    read, digest = [], outputs.xxh3_64_intdigest
    monkeypatch.setattr(outputs, "xxh3_64_intdigest", lambda block: read.append(len(block)) or digest(block))
    check_file(written, "mend it")
    assert read == [100] * 64
    written.write_bytes(bytes(12_345) + b"x" + bytes(87_654))
    with refuses(written, "is damaged"):
        # One of a thousand blocks is found in 16 tries on average; in 2000 it is missed once in 10^55 times.
        for _ in range(2000):
            check_file(written, "mend it")
