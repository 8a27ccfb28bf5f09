"""Source files in a local folder, on the Hub, or in another store that fsspec can read; listed once and streamed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from glob import glob
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from xxhash import xxh3_64_hexdigest, xxh3_128

from training.common.errors import UserError, in_one_line
from training.common.outputs import locked, write_whole
from training.common.yaml_file import RULE

_HASHED_BYTES = 1 << 22
# Nanoseconds: more than the coarsest time resolution of a file system.
_RECENT = 3 * 10**9


@dataclass(frozen=True)
class RemoteFile:
    """One file of a remote store."""

    url: str  # such as hf://datasets/OWNER/NAME@REVISION/a.parquet
    size: int | None = None  # bytes; None if the file was not listed
    version: str = ""  # the store's identifier of this content, if it has one

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.url).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.url).stem

    def __str__(self) -> str:
        return self.url


SourceFile = Path | RemoteFile


def as_file(path: str | SourceFile) -> SourceFile:
    """Return the file at a path or, with ``://`` in it, at an address."""
    if isinstance(path, str):
        return RemoteFile(path) if "://" in path else Path(path)
    return path


def identity(file: SourceFile, memory: Path | None = None) -> tuple[str, int | None, str]:
    """Return name, bytes and version of a file: equal as long as its content is the same.

    Args:
        file: The file.
        memory: A folder that stores the hashes of local files by path, size and times, so that a large file is hashed
            once. It may be read-only.
    """
    if isinstance(file, RemoteFile):
        if file.size is not None:
            return file.name, file.size, file.version
        with _reaching(file):
            info = _store(file.url)[0].info(file.url)
        return file.name, info["size"], _version(info)
    if not file.exists():
        raise _missing(file)
    stat, where = file.stat(), str(file.resolve())
    if memory is None:
        return file.name, stat.st_size, _content(file)
    # A program can set the modification time back after a write, but not the change time.
    state = [where, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = memory / f"{xxh3_64_hexdigest(where.encode())}.json"
    with suppress(OSError, ValueError, TypeError):
        *known, content = json.loads(note.read_text(encoding="utf-8"))
        if known == state:
            return file.name, stat.st_size, content
    content = _content(file)
    # A file that was just written may be written again within the same time stamp: it is hashed again next time.
    if time.time_ns() - stat.st_ctime_ns > _RECENT:
        with suppress(OSError, UserError), locked(note):
            write_whole(note, json.dumps([*state, content]) + "\n")
    return file.name, stat.st_size, content


def _content(file: Path) -> str:
    digest = xxh3_128()
    try:
        with file.open("rb") as handle:
            while block := handle.read(_HASHED_BYTES):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the file and its permissions") from None
    return digest.hexdigest()


@contextmanager
def opened(file: SourceFile) -> Iterator[Any]:
    """Open a parquet file for random access; errors of the file inside the block become ``UserError``."""
    if isinstance(file, RemoteFile):
        # Parquet knows the ranges that it needs: a read-ahead cache would also fetch the bytes between the columns.
        with _reaching(file), _store(file.url)[0].open(file.url, "rb", cache_type="none") as handle:
            yield handle
        return
    if not file.exists():
        raise _missing(file)
    if not file.stat().st_size:
        raise UserError(f"{file}: the file is empty; download or build it again")
    try:
        with pa.OSFile(str(file)) as handle:
            yield handle
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


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
            matches = sorted(glob(pattern, root_dir=self.root, recursive=True))
            return [self.root / match for match in matches if (self.root / match).is_file()]
        return [file for name, file in sorted(self._listing.items()) if _fits(name.split("/"), pattern.split("/"))]

    @cached_property
    def _listing(self) -> dict[str, SourceFile]:
        """All files of a remote folder by their path within it, listed once for all sources."""
        with _reaching(self.root):
            store, root = _store(str(self.root))
            infos = [info for info in _walk(store, root) if info["name"].startswith(f"{root}/")]
        found = {info["name"].removeprefix(f"{root}/"): info for info in infos}
        return {name: RemoteFile(f"{self.root}/{name}", info["size"], _version(info)) for name, info in found.items()}


def _walk(store: Any, folder: str) -> Iterator[dict[str, Any]]:
    # Unlike the store's own find(), this fails if the folder does not exist.
    for info in store.ls(folder, detail=True):
        if info["type"] == "directory":
            yield from _walk(store, info["name"])
        else:
            yield info


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path matches a pattern, both split at ``/``, with the meaning of ``*`` and ``**`` in ``glob``."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _store(url: str) -> tuple[Any, str]:
    # Loaded only for remote files.
    from fsspec.core import url_to_fs

    return url_to_fs(url)


def _version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in ("blob_id", "ETag", "etag") if info.get(key)), ""))


@contextmanager
def _reaching(where: object) -> Iterator[None]:
    """Turn the errors of a store's client into ``UserError``; HTTP clients share no base class of errors."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{where}: no such repository, revision or file ({in_one_line(error)}); "
            "check the address, and log in with `hf auth login` if it is private or gated"
        ) from None
    except Exception as error:
        # Arrow's own errors mean that the content is wrong, those of a client that it did not arrive.
        if isinstance(error, pa.ArrowException) or type(error) is OSError:
            raise _damaged(where, error) from None
        raise UserError(
            f"{where}: cannot be reached ({type(error).__name__}: {in_one_line(error)}); check the connection and "
            "your access, or download the files and give their folder as the data folder"
        ) from None


def _missing(file: Path) -> UserError:
    return UserError(f"{file}: no such file; download or build it, or correct the path ({RULE})")


def _damaged(where: object, error: Exception) -> UserError:
    reason = in_one_line(error)[:200]
    return UserError(f"{where}: not a readable parquet file ({reason}); download or build it again")


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
