"""Data folders and files: a store that fsspec reaches gives what a local folder gives, and says what went wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.training.data.prepared_rows import Refuses
from training.data import storage
from training.data.published import PublishedFile
from training.data.storage import DataFolder, RemoteFile, as_file, identity, stage_folder

NAMES = ["a.parquet", "b_10.parquet", "b_2.parquet", "c#+.parquet", "deep/c.parquet", "deep/er/d.parquet"]
PATTERNS = "a.parquet b_*.parquet *.parquet deep/*.parquet **/*.parquet d*/c.parquet b_[13]* none".split()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES, start=1):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [f"text {row}" for row in range(number * 10)]
        pq.write_table(pa.table({"query": texts, "passage": texts, "negative_1": texts[::-1]}), tmp_path / name)
    return tmp_path


@pytest.fixture
def remote(local: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    for name in NAMES:
        store.pipe(f"/data/{name}", (local / name).read_bytes())
    yield "memory://data"
    store.rm("/", recursive=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_remote_folder_finds_what_a_local_one_finds(local: Path, remote: str, pattern: str) -> None:
    here = [str(file.relative_to(local)) for file in DataFolder(local).find(pattern)]
    there = [str(file).removeprefix(f"{remote}/") for file in DataFolder(remote).find(pattern)]
    assert there == here


def test_remote_folder_is_listed_once(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    ls = MemoryFileSystem.ls
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, **kw: listed.append(path) or ls(self, path, **kw))
    folder = DataFolder(f"{remote}/")
    for pattern in PATTERNS:
        folder.find(pattern)
    assert sorted(listed) == ["/data", "/data/deep", "/data/deep/er"]


@pytest.mark.parametrize("name", NAMES)
def test_remote_file_reads_as_a_local_one(local: Path, remote: str, name: str) -> None:
    here, there = PublishedFile(local / name, 1), PublishedFile(f"{remote}/{name}", 1)
    assert (there.num_rows, there.negatives) == (here.num_rows, here.negatives)
    rows = [[batch.columns for batch in file.batches(7)] for file in (here, there)]
    assert rows[0] == rows[1] and len(rows[0]) > 1


class Handle:
    """A remote file that counts what is read of it, or whose connection drops."""

    def __init__(self, handle: Any, drops: bool = False) -> None:
        self.handle, self.drops, self.sizes = handle, drops, []

    def read(self, size: int = -1) -> bytes:
        if self.drops:
            raise ConnectionResetError("dropped")
        data = self.handle.read(size)
        self.sizes.append(len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """The handles of remote files that were opened, filled as they are; the third one drops its connection."""
    opened, opener = [], MemoryFileSystem.open

    def counting(self: MemoryFileSystem, *given: Any, **keys: Any) -> Handle:
        opened.append(Handle(opener(self, *given, **keys), drops=len(opened) == 2))
        return opened[-1]

    monkeypatch.setattr(MemoryFileSystem, "open", counting)
    return opened


def test_remote_file_is_fetched_in_ranges_and_closed(
    tmp_path: Path, remote: str, handles: list[Handle], refuses: Refuses
) -> None:
    texts = [os.urandom(1000).hex() for _ in range(12_000)]
    columns = {"query": texts, "passage": texts, "negative_1": texts[::-1]}
    pq.write_table(pa.table(columns), tmp_path / "big.parquet", row_group_size=len(texts), compression="none")
    content = (tmp_path / "big.parquet").read_bytes()
    fsspec.filesystem("memory").pipe("/data/big.parquet", content)
    handles.clear()
    file = PublishedFile(f"{remote}/big.parquet", 1)
    assert sum(handles[0].sizes) < 200_000  # the footer
    batches = file.batches(100)
    assert len(next(batches)) == 100
    assert sum(handles[1].sizes) < len(content) / 4
    batches.close()
    with refuses(f"{remote}/big.parquet", "cannot be reached", "ConnectionResetError", "dropped"):
        list(file.batches())
    assert len(handles) == 3 and all(handle.closed for handle in handles)


def test_identity_changes_with_the_content(local: Path, remote: str) -> None:
    name, size, version = identity(local / "a.parquet")
    assert (name, size) == ("a.parquet", (local / "a.parquet").stat().st_size)
    os.utime(local / "a.parquet", ns=(1, 1))
    assert identity(local / "a.parquet") == (name, size, version)
    content = bytearray((local / "a.parquet").read_bytes())
    content[size // 2] ^= 1
    (local / "other").mkdir()
    (local / "other/a.parquet").write_bytes(content)
    found = identity(local / "other/a.parquet")
    assert found[:2] == (name, size) and found[2] != version
    (listed,) = DataFolder(remote).find("a.parquet")
    assert isinstance(listed, RemoteFile)
    assert identity(listed) == identity(RemoteFile(str(listed))) == (name, size, "")
    fsspec.filesystem("memory").pipe("/data/a.parquet", b"PAR1")
    assert identity(RemoteFile(str(listed))) != identity(listed)


def test_a_file_is_hashed_once(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, content = [], storage._content
    monkeypatch.setattr(storage, "_content", lambda file: hashed.append(file) or content(file))
    monkeypatch.setattr(storage, "_RECENT", 0)
    path, memory = local / "a.parquet", tmp_path / "memory"
    first = identity(path, memory)
    assert [identity(path, memory), identity(path.parent / "deep/../a.parquet", memory)] == [first, first]
    assert hashed == [path]
    # Written again within the same size and with its time set back, it is another file.
    stat, changed = path.stat(), bytearray(path.read_bytes())
    changed[-20] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(path, memory) != first and len(hashed) == 2
    # A note that is damaged, or cannot be written, costs no more than time.
    for note in memory.iterdir():
        note.write_text("{")
    assert identity(path, memory) == identity(path, path / "no folder") == identity(path)


def test_a_file_that_is_still_being_written_is_not_remembered(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, stat = local / "a.parquet", Path.stat

    def coarse(self: Path, **options: bool) -> object:
        # As a file system tells them that has times of a second, or of some milliseconds.
        found = stat(self, **options)
        times = {"st_mtime_ns": found.st_mtime_ns // 10**9 * 10**9, "st_ctime_ns": found.st_ctime_ns // 10**9 * 10**9}
        return SimpleNamespace(st_mode=found.st_mode, st_size=found.st_size, **times)

    monkeypatch.setattr(Path, "stat", coarse)
    for number in range(20):
        changed = bytearray(path.read_bytes())
        changed[-20] = number
        path.write_bytes(changed)
        assert identity(path, tmp_path / "memory") == identity(path)


def test_address_and_path_are_told_apart() -> None:
    assert as_file("a/b.parquet") == Path("a/b.parquet")
    file = as_file("hf://datasets/owner/name@main/deep/a.b.parquet")
    assert isinstance(file, RemoteFile) and (file.name, file.stem) == ("a.b.parquet", "a.b")
    assert as_file(file) is file


def test_what_is_not_there(local: Path, remote: str, refuses: Refuses) -> None:
    with refuses(local / "none", "no such file"):
        identity(local / "none")
    missing = (f"{remote}/none", "no such repository, revision or file", "hf auth login")
    with refuses(*missing):
        identity(RemoteFile(f"{remote}/none"))
    with refuses(*missing):
        PublishedFile(f"{remote}/none.parquet")
    with refuses("memory://nowhere", *missing[1:]):
        DataFolder("memory://nowhere").find("*")


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1"])
def test_remote_file_that_is_no_parquet(remote: str, refuses: Refuses, content: bytes) -> None:
    fsspec.filesystem("memory").pipe("/data/a.parquet", content)
    with refuses(f"{remote}/a.parquet", "not a readable parquet file"):
        PublishedFile(f"{remote}/a.parquet")


def test_hub_without_a_connection(refuses: Refuses) -> None:
    # The tests run offline.
    with refuses("hf://datasets/owner/name", "cannot be reached", "offline", "data folder"):
        DataFolder("hf://datasets/owner/name").find("*.parquet")
    with refuses("hf://datasets/owner/name/a.parquet", "cannot be reached", "data folder"):
        PublishedFile("hf://datasets/owner/name/a.parquet")


@pytest.mark.parametrize("error", [ConnectionError("line is down"), PermissionError("gated"), RuntimeError("429")])
def test_connection_that_fails(
    remote: str, refuses: Refuses, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    with refuses(f"{remote}/a.parquet", "cannot be reached", error, "check the connection and your access"):
        PublishedFile(f"{remote}/a.parquet")
    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    with refuses(remote, "cannot be reached", error):
        DataFolder(remote).find("*")


def test_fault_in_a_row_is_no_fault_of_the_connection(remote: str, tmp_path: Path, refuses: Refuses) -> None:
    pq.write_table(pa.table({"query": ["a", None], "passage": ["b", "c"]}), tmp_path / "null.parquet")
    fsspec.filesystem("memory").pipe("/data/null.parquet", (tmp_path / "null.parquet").read_bytes())
    with refuses(f"{remote}/null.parquet", "row 1,", "null"):
        list(PublishedFile(f"{remote}/null.parquet").batches())


def test_intermediate_results_follow_the_content_and_not_its_time(tmp_path: Path) -> None:
    path, work = tmp_path / "a.txt", tmp_path / "work"

    def made_of(text: str, time: int, options: object = None) -> Path:
        path.write_text(text)
        os.utime(path, (time, time))
        return stage_folder(work, "exact", [path], options)

    first = made_of("panda", 1)
    # A copy of the same bytes costs no second run.
    assert made_of("panda", 2) == first
    other = made_of("tiger", 1)
    assert other != first and other.exists() and not first.exists()
    assert made_of("tiger", 1, {"near": True}) != other
