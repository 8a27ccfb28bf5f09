"""Data folders and files: a store that fsspec reaches gives what a local folder gives, and says what went wrong."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from training.data.published import PublishedFile
from training.data.storage import DataFolder, RemoteFile, identity, stage_folder

NAMES = ["a.parquet", "b_10.parquet", "b_2.parquet", "c#+.parquet", "deep/c.parquet", "deep/er/d.parquet"]
PATTERNS = "a.parquet b_*.parquet *.parquet deep/*.parquet **/*.parquet d*/c.parquet b_[13]* none".split()


@pytest.fixture
def local(tmp_path):
    for number, name in enumerate(NAMES, start=1):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [f"text {row}" for row in range(number * 10)]
        pq.write_table(pa.table({"query": texts, "passage": texts, "negative_1": texts[::-1]}), tmp_path / name)
    return tmp_path


@pytest.fixture
def remote(local):
    store = fsspec.filesystem("memory")
    for name in NAMES:
        store.pipe(f"/data/{name}", (local / name).read_bytes())
    yield "memory://data"
    store.rm("/", recursive=True)


def test_remote_folder_finds_and_reads_what_a_local_one_does(local, remote):
    for pattern in PATTERNS:
        here = [str(file.relative_to(local)) for file in DataFolder(local).find(pattern)]
        there = [str(file).removeprefix(f"{remote}/") for file in DataFolder(f"{remote}/").find(pattern)]
        assert there == here
    for name in NAMES:
        here, there = PublishedFile(str(local / name), 1), PublishedFile(f"{remote}/{name}", 1)
        assert there.path.stem == here.path.stem
        assert (there.num_rows, there.negatives) == (here.num_rows, here.negatives)
        rows = [[batch.columns for batch in file.batches(7)] for file in (here, there)]
        assert rows[0] == rows[1] and len(rows[0]) > 1


class Handle(BytesIO):
    """A remote file that counts what is read of it, or whose connection drops."""

    def __init__(self, content, drops):
        super().__init__(content)
        self.drops, self.sizes = drops, []

    def read(self, size=-1):
        if self.drops:
            raise ConnectionResetError("dropped")
        self.sizes.append(len(data := super().read(size)))
        return data


def test_remote_file_is_fetched_in_ranges_and_closed(tmp_path, remote, monkeypatch, refuses):
    texts = [os.urandom(1000).hex() for _ in range(12_000)]
    columns = {"query": texts, "passage": texts, "negative_1": texts[::-1]}
    pq.write_table(pa.table(columns), tmp_path / "big.parquet", row_group_size=len(texts), compression="none")
    content = (tmp_path / "big.parquet").read_bytes()
    fsspec.filesystem("memory").pipe("/data/big.parquet", content)
    handles, opener = [], MemoryFileSystem.open

    def counting(self, *given, **keys):
        # The third one drops its connection.
        handles.append(Handle(opener(self, *given, **keys).read(), drops=len(handles) == 2))
        return handles[-1]

    monkeypatch.setattr(MemoryFileSystem, "open", counting)
    file = PublishedFile(f"{remote}/big.parquet", 1)
    assert sum(handles[0].sizes) < 200_000  # the footer
    batches = file.batches(100)
    assert len(next(batches)) == 100
    assert sum(handles[1].sizes) < len(content) / 4
    batches.close()
    with refuses(f"{remote}/big.parquet", "cannot be reached", "ConnectionResetError", "dropped"):
        list(file.batches())
    assert len(handles) == 3 and all(handle.closed for handle in handles)


def test_a_file_is_hashed_once_and_a_remote_one_never(local, tmp_path, monkeypatch, remote):
    path, memory, opened, opener = local / "a.parquet", tmp_path / "memory", [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or opener(self, *a, **k))
    first = identity(path, memory)
    assert first[:2] == ("a.parquet", path.stat().st_size)
    assert [identity(path, memory), identity(path.parent / "deep/../a.parquet", memory)] == [first, first]
    assert opened.count("a.parquet") == 1
    # Written again within the same size and with its time set back, it is another file.
    stat, changed = path.stat(), bytearray(path.read_bytes())
    changed[-20] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(path, memory) != first
    # A note that is damaged, or cannot be written, costs no more than time.
    for note in memory.iterdir():
        note.write_text("{")
    assert identity(path, memory) == identity(path, path / "no folder") == identity(path)
    (listed,) = DataFolder(remote).find("a.parquet")
    size = (local / "a.parquet").stat().st_size
    assert identity(listed) == identity(RemoteFile(str(listed))) == ("a.parquet", size, "")
    fsspec.filesystem("memory").pipe("/data/a.parquet", b"PAR1")
    assert identity(RemoteFile(str(listed))) != identity(listed)


def test_what_is_not_there(local, remote, refuses):
    with refuses(local / "none", "no such file"):
        identity(local / "none")
    missing = "no such file or repository", "hf auth login"
    for read in (identity, PublishedFile):
        with refuses(f"{remote}/none", *missing):
            read(RemoteFile(f"{remote}/none"))
    with refuses("memory://nowhere", *missing):
        DataFolder("memory://nowhere").find("*")
    fsspec.filesystem("memory").pipe("/data/a.parquet", b"no parquet at all")
    with refuses(f"{remote}/a.parquet", "not a readable parquet file"):
        PublishedFile(f"{remote}/a.parquet")


@pytest.mark.parametrize("error", [ConnectionError("line is down"), PermissionError("gated"), RuntimeError("429")])
def test_connection_that_fails(remote, refuses, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    with refuses(f"{remote}/a.parquet", "cannot be reached", error, "check the connection and your access"):
        PublishedFile(f"{remote}/a.parquet")
    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    with refuses(remote, "cannot be reached", error):
        DataFolder(remote).find("none")
    # The tests run offline.
    with refuses("hf://datasets/owner/name", "cannot be reached", "offline"):
        DataFolder("hf://datasets/owner/name").find("*.parquet")


def test_intermediate_results_follow_the_content_and_not_its_time(tmp_path):
    path, work = tmp_path / "a.txt", tmp_path / "work"

    def made_of(text, time, options=None):
        path.write_text(text)
        os.utime(path, (time, time))
        return stage_folder(work, "exact", [path], options)

    first = made_of("panda", 1)
    # A copy of the same bytes costs no second run.
    assert made_of("panda", 2) == first
    other = made_of("tiger", 1)
    assert other != first and other.exists() and not first.exists()
    assert made_of("tiger", 1, {"near": True}) != other
