"""Outputs are written by one command at a time, are complete or absent, never replace an input, and are checked."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import filelock
import pytest
from packaging.specifiers import SpecifierSet

from training.common import outputs
from training.common.errors import UserError
from training.common.outputs import (
    check_file,
    check_output,
    checksums_of,
    clear_partials,
    locked,
    new_folder,
    publish,
    temporary_folder,
    write_checksums,
    write_whole,
)

Refuses = Callable[..., AbstractContextManager[None]]


def _write(output: Path, text: str, entered: multiprocessing.Queue) -> None:
    with locked(output):
        entered.put(text)
        before = output.read_text() if output.exists() else ""
        time.sleep(0.3)
        output.write_text(before + text)


def test_commands_that_write_the_same_wait_for_one_another(tmp_path: Path) -> None:
    context, output = multiprocessing.get_context("fork"), tmp_path / "new" / "file"
    entered = context.Queue()
    writers = [context.Process(target=_write, args=(output, text, entered)) for text in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert sorted(output.read_text()) == ["a", "b", "c"]
    assert [path.name for path in output.parent.iterdir()] == ["file"]


def _enter(output: Path, times: int, together: Synchronized) -> None:
    for _ in range(times):
        with locked(output):
            try:
                output.touch(exist_ok=False)
                output.unlink()
            except FileExistsError:
                together.value += 1


def test_two_are_never_in_together_however_they_meet(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Value("i", 0)
    each = [context.Process(target=_enter, args=(tmp_path / "a", 100, together)) for _ in range(4)]
    for process in each:
        process.start()
    for process in each:
        process.join(60)
    assert [process.exitcode for process in each] == [0] * 4 and together.value == 0


def test_releases_that_let_two_commands_hold_a_lock_are_not_asked_for() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    # Training, and the environments of the two exports.
    asked = re.findall(r'"filelock([^"]*)"', project)
    assert len(asked) == 3
    for each in asked:
        # The last one to unlink the file again when a lock is released, which is then another command's.
        assert "3.24" not in SpecifierSet(each) and filelock.__version__ in SpecifierSet(each)


def test_a_killed_command_keeps_nobody_waiting(tmp_path: Path) -> None:
    context, output = multiprocessing.get_context("fork"), tmp_path / "file"
    entered = context.Queue()
    killed = context.Process(target=_write, args=(output, "lost", entered))
    killed.start()
    assert entered.get(timeout=30) == "lost"
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(30)
    # Not the same queue: the killed process may have held its lock.
    _write(output, "kept", context.Queue())
    assert output.read_text() == "kept"


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "output"):
        pass


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    output = tmp_path / "output"
    (tmp_path / ".output.partial").mkdir()
    (tmp_path / ".output.partial" / "left by a kill").write_text("")
    with pytest.raises(ZeroDivisionError), new_folder(output) as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(output) as folder:
        (folder / "file").write_text("")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["file"]


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    place, link = tmp_path / "disk" / "place", tmp_path / "link"
    place.mkdir(parents=True)
    link.symlink_to(place)
    for text in ("one", "two"):
        with new_folder(link) as folder:
            (folder / "file").write_text(text)
        assert link.is_symlink() and (place / "file").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "file", "link", "place"]


def test_a_file_system_without_modes_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "chmod", refuse)
    with new_folder(tmp_path / "output") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "output/file").is_file()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_published_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        partial = tmp_path / "partial"
        (partial / "inner").mkdir(parents=True)
        # As safetensors leaves them.
        for file in (partial / "model.safetensors", partial / "inner" / "model.safetensors"):
            file.touch(mode=0o600)
        publish(partial, tmp_path / "final")
    finally:
        os.umask(before)
    for file in (tmp_path / "final").rglob("*.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == mode


def test_an_output_that_is_being_written_can_be_refused(tmp_path: Path) -> None:
    # Spelled in another way, it is the same.
    other = tmp_path / "folder" / ".." / "output"
    with locked(tmp_path / "output"), pytest.raises(UserError, match="output: is in use"), locked(other, "is in use"):
        pass
    with locked(other, "is in use"):
        pass


def test_what_killed_commands_left_is_cleared_but_not_what_is_written(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    for name in (".a.partial/file", ".b.partial", ".c.partial", "d.partial", ".e"):
        (tmp_path / name).write_text("")
    with locked(tmp_path / "c"):
        clear_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.partial", ".e", "d.partial"]


def test_temporary_folders_of_killed_commands_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "f2llm-scratch-killed" / "model").mkdir(parents=True)
    (tmp_path / "another").mkdir()
    with temporary_folder() as first, temporary_folder() as second:
        assert sorted(tmp_path.glob("[!.]*")) == sorted([tmp_path / "another", Path(first), Path(second)])
        assert stat.S_IMODE(Path(first).stat().st_mode) == 0o700
    assert list(tmp_path.iterdir()) == [tmp_path / "another"]


def test_an_output_is_not_written_over_what_is_read(tmp_path: Path) -> None:
    source = tmp_path / "data" / "a.parquet"
    source.parent.mkdir()
    source.write_text("")
    link = tmp_path / "link"
    link.symlink_to(source.parent)
    for output in (source, source.parent, tmp_path, link):
        with pytest.raises(UserError, match="is read; give another --to"):
            check_output(output, [source], option="--to")
    # Beside it, or below its folder, nothing is lost.
    check_output(source.parent / "mined", [source])
    # A folder that is read as a whole would be another one.
    with pytest.raises(UserError, match=r"lies in .*data, which is read"):
        check_output(source.parent / "mined", [source.parent])
    # A name on the Hub is no folder.
    check_output(tmp_path / "org", [tmp_path / "org" / "name"])


def test_foreign_files_in_an_output_are_refused(tmp_path: Path) -> None:
    check_output(tmp_path / "new", ours=[])
    (tmp_path / "report.json").write_text("")
    check_output(tmp_path, ours=["report.json"])
    check_output(tmp_path, ours=["*.json"])
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        check_output(tmp_path, ours=["report.json"])
    check_output(tmp_path)


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    write_whole(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"

    def no_room(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "größer"


# Checksums


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_BLOCK_BYTES", 100)


@pytest.fixture
def written(tmp_path: Path, small_blocks: None) -> Path:
    """A file of 64 blocks, the last of which is cut."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 24 + b"the end" * 30)
    write_checksums(path)
    check_file(path, "mend it")
    return path


def flipped(place: int) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[place] ^= 1
        return bytes(changed)

    return flip


@pytest.mark.parametrize(
    "change",
    [
        *map(flipped, (0, 99, 100, 3000, -1)),
        *(lambda content: content[:-1], lambda content: content + b"x", lambda content: b""),
    ],
)
def test_changed_bytes_are_noticed(written: Path, refuses: Refuses, change: Callable[[bytes], bytes]) -> None:
    written.write_bytes(change(written.read_bytes()))
    with refuses(written, "is damaged", "mend it"):
        check_file(written, "mend it")


def test_missing_files_are_named(written: Path, refuses: Refuses) -> None:
    for path in (checksums_of(written), written):
        path.unlink()
        with refuses(written, "cannot be checked", "mend it"):
            check_file(written, "mend it")


def test_an_empty_file_is_whole(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    write_checksums(tmp_path / "empty")
    check_file(tmp_path / "empty", "mend it")


def test_a_large_file_is_read_in_part_each_time_another(
    tmp_path: Path, small_blocks: None, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "large", []
    path.write_bytes(bytes(100_000))
    write_checksums(path)
    digest = outputs.xxh3_64_intdigest
    monkeypatch.setattr(outputs, "xxh3_64_intdigest", lambda block: read.append(len(block)) or digest(block))
    check_file(path, "mend it")
    assert read == [100] * 64
    content = bytearray(path.read_bytes())
    content[12_345] = 1
    path.write_bytes(content)
    with refuses(path, "is damaged"):
        # One of a thousand blocks is found in 16 tries on average; in 2000 it is missed once in 10^55 times.
        for _ in range(2000):
            check_file(path, "mend it")
