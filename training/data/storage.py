"""Where source files lie: in a folder, or on the Hub or another store that fsspec reaches; listed once, streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import pyarrow as pa
from xxhash import xxh3_64_hexdigest, xxh3_128

from training.common.errors import UserError, in_one_line
from training.common.outputs import locked
from training.common.paths import RULE
from training.common.run_folder import write_whole

# Read at a time to hash a file.
_HASHED_BYTES = 1 << 22
# Nanoseconds: the coarsest times of a file system, with room.
_RECENT = 3 * 10**9


@dataclass(frozen=True)
class RemoteFile:
    """One file of a store that is not this machine's.

    Attributes:
        url: Its address, such as ``hf://datasets/OWNER/NAME@REVISION/a.parquet``.
        size: Bytes; None if the file was not listed.
        version: What the store calls this content, so that a changed file shows; empty if it does not say.
    """

    url: str
    size: int | None = None
    version: str = ""

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    def __str__(self) -> str:
        return self.url


SourceFile = Path | RemoteFile


def as_file(path: str | SourceFile) -> SourceFile:
    """The file at a path or, with ``://`` in it, at an address."""
    if isinstance(path, str):
        return RemoteFile(path) if "://" in path else Path(path)
    return path


def identity(file: SourceFile, memory: Path | None = None) -> tuple[str, int | None, str]:
    """Name, bytes and content of a file: equal as long as its content is the same, whatever its time.

    Args:
        file: The file. Of a remote one, the store says which content it is.
        memory: A folder in which the hashes of local files are remembered by path, size and times, so that a large file
            is hashed once. One that cannot be written is only read.

    Raises:
        UserError: If the file is missing or cannot be reached.
    """
    if isinstance(file, RemoteFile):
        if file.size is not None:
            return file.name, file.size, file.version
        with _reaching(file):
            info = _store(file.url)[0].info(file.url)
        return file.name, info["size"], _version(info)
    if not file.exists():
        raise UserError(f"{file}: no such file; download or build it, or correct the path ({RULE})")
    stat, where = file.stat(), str(file.resolve())
    # The second time cannot be set back, as the first can after a write.
    told = [where, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if memory is None:
        return file.name, stat.st_size, _content(file)
    note = memory / f"{xxh3_64_hexdigest(where.encode())}.json"
    with suppress(OSError, ValueError, TypeError):
        *known, content = json.loads(note.read_text(encoding="utf-8"))
        if known == told:
            return file.name, stat.st_size, content
    content = _content(file)
    # A file that was written just now may be written again without other times: it is hashed the next time, too.
    if time.time_ns() - stat.st_ctime_ns > _RECENT:
        # Data on a read-only disk is as good.
        with suppress(OSError, UserError), locked(note):
            write_whole(note, json.dumps([*told, content]) + "\n")
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
    """Opens a file for reading from anywhere in it; what goes wrong in the block with the file is a ``UserError``.

    Raises:
        UserError: If the file is missing, empty, not readable as parquet or cannot be reached.
    """
    if isinstance(file, RemoteFile):
        with _reaching(file):
            # Parquet knows the ranges it wants: a cache that reads ahead would fetch those between the columns too.
            with _store(file.url)[0].open(file.url, "rb", cache_type="none") as handle:
                yield handle
        return
    if not file.exists():
        raise UserError(f"{file}: no such file; download or build it, or correct the path ({RULE})")
    if not file.stat().st_size:
        raise UserError(f"{file}: the file is empty; download or build it again")
    try:
        with pa.OSFile(str(file)) as handle:
            yield handle
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


class DataFolder:
    """The folder that the files of a manifest are looked for in.

    Args:
        root: A local folder, or the address of one, such as ``hf://datasets/OWNER/NAME@REVISION``.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = root.rstrip("/") if isinstance(root, str) and "://" in root else Path(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, pattern: str) -> str:
        """How an error names a file or a pattern of this folder."""
        return str(self.root / pattern) if isinstance(self.root, Path) else f"{self.root}/{pattern}"

    def find(self, pattern: str) -> list[SourceFile]:
        """Files that fit a pattern (``*`` within a folder, ``**`` across folders), by name.

        Raises:
            UserError: If the folder is remote and cannot be listed.
        """
        if isinstance(self.root, Path):
            matches = sorted(glob(pattern, root_dir=self.root, recursive=True))
            return [self.root / match for match in matches if (self.root / match).is_file()]
        return [file for name, file in sorted(self._listing.items()) if _fits(name.split("/"), pattern.split("/"))]

    @cached_property
    def _listing(self) -> dict[str, SourceFile]:
        """All files of a remote folder by their path within it; one request however many sources there are."""
        with _reaching(self.root):
            store, root = _store(str(self.root))
            # Unlike find(), this fails if there is no such folder.
            found = {name: each for name, each in _walk(store, root) if name.startswith(f"{root}/")}
        return {
            name.removeprefix(f"{root}/"): RemoteFile(
                f"{self.root}/{name.removeprefix(f'{root}/')}", info["size"], _version(info)
            )
            for name, info in found.items()
        }


def _walk(store: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for info in store.ls(folder, detail=True):
        if info["type"] == "directory":
            yield from _walk(store, info["name"])
        else:
            yield info["name"], info


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path fits a pattern, both split at ``/``, with glob's meaning of ``*`` and ``**``."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _store(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path within it."""
    from fsspec.core import url_to_fs

    return url_to_fs(url)


def _version(info: dict[str, Any]) -> str:
    return str(next((info[key] for key in ("blob_id", "ETag", "etag") if info.get(key)), ""))


@contextmanager
def _reaching(where: object) -> Iterator[None]:
    """Turns what a store's client raises into a ``UserError``; the errors of HTTP clients share no class of ours."""
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
        # Arrow's own errors say that the content is wrong, those of a client that it did not come.
        if isinstance(error, pa.ArrowException) or type(error) is OSError:
            raise _damaged(where, error) from None
        raise UserError(
            f"{where}: cannot be reached ({type(error).__name__}: {in_one_line(error)}); check the connection and "
            "your access, or download the files and give their folder as the data folder"
        ) from None


def _damaged(where: object, error: Exception) -> UserError:
    reason = in_one_line(error)[:200]
    return UserError(f"{where}: not a readable parquet file ({reason}); download or build it again")
