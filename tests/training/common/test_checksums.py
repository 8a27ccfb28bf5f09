"""Checksums: a file that is not as it was written is noticed, and no more of it is read than is said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from training.common import checksums
from training.common.checksums import check_file, checksums_of, write_checksums

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_BLOCK_BYTES", 100)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file of 64 blocks, the last of which is cut."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 24 + b"the end" * 30)
    write_checksums(path)
    check_file(path, "mend it")
    return path


@pytest.mark.parametrize("place", [0, 99, 100, 3000, -1])
def test_a_flipped_bit_is_noticed(written: Path, refuses: Refuses, place: int) -> None:
    content = bytearray(written.read_bytes())
    content[place] ^= 1
    written.write_bytes(content)
    with refuses(written, "is damaged", "mend it"):
        check_file(written, "mend it")


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"x", lambda content: b""])
def test_another_size_is_noticed(written: Path, refuses: Refuses, change: Callable[[bytes], bytes]) -> None:
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
    tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "large", []
    path.write_bytes(bytes(100_000))
    write_checksums(path)
    digest = checksums.xxh3_64_intdigest
    monkeypatch.setattr(checksums, "xxh3_64_intdigest", lambda block: read.append(len(block)) or digest(block))
    check_file(path, "mend it")
    assert read == [100] * 64
    content = bytearray(path.read_bytes())
    content[12_345] = 1
    path.write_bytes(content)
    with refuses(path, "is damaged"):
        # One of a thousand blocks is found in 16 tries on average; in 2000 it is missed once in 10^55 times.
        for _ in range(2000):
            check_file(path, "mend it")
