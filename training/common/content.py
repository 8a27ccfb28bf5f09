"""Files as the Hub knows them, by size and hash, and whether a local file is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# The Hub's own file of a repository: which names are large files. It is never removed.
ATTRIBUTES = ".gitattributes"

# Larger files are read piece by piece and uploaded one by one before the commit.
LARGE_BYTES = 2**20
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision.

    Attributes:
        size: Bytes.
        blob: Id that git gives the file; of a large one, that of the pointer to it.
        sha256: Of the content of a large file; None for others.
    """

    size: int
    blob: str
    sha256: str | None = None


@dataclass(frozen=True)
class Content:
    """What a file shall hold: a file on disk, or bytes.

    The hashes are taken once, and hold for what is sent: a small file is read with them and sent from memory, a large
    one must not change until it is sent.
    """

    source: Path | bytes

    @classmethod
    def of(cls, source: Path | bytes | Content) -> Content:
        """The content of a source; one that was made before keeps its hashes."""
        return source if isinstance(source, Content) else cls(source)

    @cached_property
    def _stamp(self) -> tuple[int, ...]:
        """What changes with every write to the file."""
        return _stamp_of(self.source) if isinstance(self.source, Path) else ()

    @cached_property
    def payload(self) -> Path | bytes:
        """What is sent: the bytes that are hashed; of a large file its path."""
        if isinstance(self.source, bytes) or self._stamp[0] >= LARGE_BYTES:
            return self.source
        return self.source.read_bytes()

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.payload) if isinstance(self.payload, bytes) else self._stamp[0]

    @cached_property
    def _hashes(self) -> tuple[str, str]:
        # https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
        blob, sha256 = hashlib.sha1(b"blob %d\0" % self.size), hashlib.sha256()
        for chunk in self._chunks():
            blob.update(chunk)
            sha256.update(chunk)
        return blob.hexdigest(), sha256.hexdigest()

    def _chunks(self) -> Iterator[bytes]:
        if isinstance(self.payload, bytes):
            yield self.payload
            return
        with self.payload.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    @property
    def sha256(self) -> str:
        """Hash of the content, in hexadecimal digits."""
        return self._hashes[1]

    @property
    def is_unchanged(self) -> bool:
        """Whether what is sent is still what was hashed."""
        return isinstance(self.payload, bytes) or _stamp_of(self.payload) == self._stamp

    def is_in(self, remote: RemoteFile) -> bool:
        """Whether a file of a revision has this content; hashes only what has the same size."""
        if remote.size != self.size:
            return False
        blob, sha256 = self._hashes
        return blob == remote.blob if remote.sha256 is None else sha256 == remote.sha256


def _stamp_of(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def same_files(wanted: Mapping[str, Content], found: Mapping[str, RemoteFile]) -> bool:
    """Whether a revision holds exactly the files that are wanted, :data:`ATTRIBUTES` aside."""
    return {*wanted} - {ATTRIBUTES} == {*found} - {ATTRIBUTES} and all(
        path in found and content.is_in(found[path]) for path, content in wanted.items()
    )
