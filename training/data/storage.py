"""Source files in a local folder, on the Hub, or in another store that fsspec reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from fsspec.core import url_to_fs
from xxhash import xxh3_64_hexdigest, xxh3_128

from training.common.errors import UserError, in_one_line
from training.common.outputs import write_whole
from training.common.yaml_file import RULE


@dataclass(frozen=True)
class RemoteFile:
    """One file of a remote store."""

    url: str  # such as hf://datasets/OWNER/NAME@REVISION/a.parquet
    size: int | None = None  # bytes; None if the file was not listed
    version: str = ""  # the store's identifier of this content, if it has one

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.url).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.url).stem


SourceFile = Path | RemoteFile


class DataFolder:
    """The folder of a manifest's files: a local one, or an address such as ``hf://datasets/OWNER/NAME@REVISION``."""

    def __init__(self, root: Path | str) -> None:
        self.root = root.rstrip("/") if isinstance(root, str) and "://" in root else Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, pattern: str) -> str:
        """Return the path or address of a file or pattern in this folder, for messages."""
        return str(self.root / pattern) if isinstance(self.root, Path) else f"{self.root}/{pattern}"

    def find(self, pattern: str) -> list[SourceFile]:
        """Return the files that match a pattern (``*`` within a folder, ``**`` across folders), sorted by name."""
        if isinstance(self.root, Path):
            paths = [self.root / match for match in sorted(glob(pattern, root_dir=self.root, recursive=True))]
            return [path for path in paths if path.is_file()]
        with _readable(self.root):
            store, root = url_to_fs(self.root)
            found = store.glob(f"{root}/{pattern}", detail=True)
            if not found:
                # A folder that is missing or out of reach also has no matches; listing it raises.
                store.ls(root)
        return [
            RemoteFile(self.path(name.removeprefix(f"{root}/")), info["size"], _version(info))
            for name, info in sorted(found.items())
            if info["type"] == "file"
        ]


def _version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in ("blob_id", "ETag", "etag") if info.get(key)), ""))


def identity(file: SourceFile, memory: Path | None = None) -> tuple[str, int | None, str]:
    """Return name, bytes and version of a file: equal as long as its content is the same.

    The folder ``memory`` stores the hashes of local files by path, size and times, so that a large file is hashed once.
    """
    if isinstance(file, RemoteFile) and file.size is None:
        with _readable(file):
            info = url_to_fs(file.url)[0].info(file.url)
        return file.name, info["size"], _version(info)
    if isinstance(file, RemoteFile):
        return file.name, file.size, file.version
    with _readable(file):
        stat, where = file.stat(), str(file.resolve())
    # A program can set the modification time back after a write, but not the change time.
    state = [where, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = None if memory is None else memory / f"{xxh3_64_hexdigest(where.encode())}.json"
    if note is not None:
        with suppress(OSError, ValueError, TypeError):
            *known, content = json.loads(note.read_text(encoding="utf-8"))
            if known == state:
                return file.name, stat.st_size, content
    with file.open("rb") as handle:
        digest = xxh3_128()
        while block := handle.read(1 << 22):
            digest.update(block)
    content = digest.hexdigest()
    if note is not None:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps([*state, content]) + "\n")
    return file.name, stat.st_size, content


@contextmanager
def opened(file: SourceFile) -> Iterator[Any]:
    """Open a parquet file for random access; errors of the file inside the block become ``UserError``."""
    with _readable(file):
        remote = isinstance(file, RemoteFile)
        # A read-ahead cache would also fetch the bytes between the columns.
        opener = url_to_fs(file.url)[0].open(file.url, "rb", cache_type="none") if remote else pa.OSFile(str(file))
        with opener as handle:
            yield handle


@contextmanager
def _readable(where: SourceFile | str) -> Iterator[None]:
    """Turn the errors of a file or of a store's client into ``UserError``."""
    try:
        yield
    # HTTP clients share no base class of errors.
    except Exception as error:
        local = isinstance(where, Path)
        if isinstance(error, UserError) or (local and not isinstance(error, OSError | pa.ArrowException)):
            raise
        reason = in_one_line(error)[:200]
        if isinstance(error, FileNotFoundError):
            fault = f"no such file or repository; correct the path ({RULE}), or run `hf auth login` if it is private"
        # Arrow's own errors mean that the content is wrong, those of a client that it did not arrive.
        elif local or isinstance(error, pa.ArrowException) or type(error) is OSError:
            fault = f"not a readable parquet file ({reason}); download or build it again"
        else:
            fault = f"cannot be reached ({type(error).__name__}: {reason}); check the connection and your access"
        raise UserError(f"{where}: {fault}") from None


def stage_folder(work: Path, stage: str, files: Sequence[Path], options: Any) -> Path:
    """Return the folder of a stage's intermediate results, and delete those of other files or (JSON) options."""
    described = [[str(path.resolve()), *identity(path, work / ".hashes")] for path in files]
    digest = blake2b(json.dumps([described, options]).encode(), digest_size=8).hexdigest()
    folder = work / f"{stage}-{digest}"
    for other in work.glob(f"{stage}-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
